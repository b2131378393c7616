"""Inference Endpoint handler for InTI-CLIP: in a model's repository it is called `handler.py`.

Request: {"inputs": a video, "parameters": {"top_k": 5, "function_to_apply": "softmax"}}, or the bytes of a video as the
body. The video is a URL (http or https), or base64, with or without the prefix "data:video/mp4;base64,".
Response: [{"label": ..., "score": ...}, ...], the best first.

Client errors raise a one-line ValueError, returned as HTTP 400.
"""

import base64
import binascii
import io
import ipaddress
import socket
import ssl
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import quote, urlsplit
from urllib.request import (
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    ProxyHandler,
    Request,
    build_opener,
)

import torch
from transformers import AutoModelForVideoClassification, AutoProcessor


REQUIREMENTS = "transformers>=5.17\ntorch>=2.11\nav>=16\n"  # requirements.txt beside handler.py
MAX_BYTES = 64 * 2**20
MAX_SECONDS = 600.0
MAX_PIXELS = 3840 * 2160  # of a frame
TIMEOUT = 30  # seconds for a whole download
FUNCTIONS = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "none": lambda logits: logits,
}


def check_url(url: str) -> None:
    """Raise a ValueError unless `url` is http(s) and names a host."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 80)
    except ValueError:  # a port that is no number, a bracket that is not closed
        good = False
    if not good:
        raise ValueError(f"the URL must begin with http:// or https:// and name a host, got {url[:100]!r}.")


def is_public(place: str) -> bool:
    """Whether an address is on the internet; an IPv4 address inside an IPv6 one is what counts."""
    address = ipaddress.ip_address(place.partition("%")[0])
    if address.version == 6:
        wrapped = address.ipv4_mapped or address.sixtofour
        if wrapped is None and address in ipaddress.ip_network("64:ff9b::/96"):
            wrapped = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if wrapped is not None:
            address = wrapped
    return address.is_global and not address.is_multicast


def public_addresses(host: str, port: int) -> list[str]:
    """The IP addresses of `host`. Raises a ValueError if it is unknown or any of them is not on the internet."""
    try:
        places = list(dict.fromkeys(place[4][0] for place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
    except (OSError, UnicodeError):
        raise ValueError(f"the host must exist, got {host!r}; check the URL.") from None
    if not all(is_public(place) for place in places):
        raise ValueError(f"the host {host!r} is not on the public internet; send the video itself instead.")
    return places


def connect(host: str, port: int, timeout: float | None) -> socket.socket:
    """A connection to one of the addresses that were checked: asked again, the name could lead elsewhere."""
    failure = OSError("no address")
    for place in public_addresses(host, port):
        try:
            return socket.create_connection((place, port), timeout)
        except OSError as error:
            failure = error
    raise failure


class _Connection(HTTPConnection):
    def connect(self):
        self.sock = connect(self.host, self.port, self.timeout)


class _SecureConnection(HTTPSConnection):
    def connect(self):
        # The certificate is that of the name, whatever the address.
        context = ssl.create_default_context()
        self.sock = context.wrap_socket(connect(self.host, self.port, self.timeout), server_hostname=self.host)


class _Handler(HTTPHandler):
    def http_open(self, request):
        return self.do_open(_Connection, request)


class _SecureHandler(HTTPSHandler):
    def https_open(self, request):
        return self.do_open(_SecureConnection, request)


class _Redirects(HTTPRedirectHandler):
    def redirect_request(self, request, *arguments):
        redirected = super().redirect_request(request, *arguments)
        if redirected is not None:
            check_url(redirected.full_url)
        return redirected


def download(url: str) -> bytes:
    """The body at `url`, at most one byte more than `MAX_BYTES`."""
    check_url(url)
    end, body = time.monotonic() + TIMEOUT, bytearray()
    # Quote what a browser would; what is quoted already stays.
    request = Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers={"User-Agent": "hf_inti"})
    # Without proxies, which would look the host up by themselves.
    opener = build_opener(ProxyHandler({}), _Handler, _SecureHandler, _Redirects)
    try:
        with opener.open(request, timeout=TIMEOUT) as response:
            while chunk := response.read1(2**20):
                body += chunk
                if len(body) > MAX_BYTES:
                    break
                if time.monotonic() > end:
                    raise TimeoutError("too slow")
    except (OSError, HTTPException, UnicodeError) as error:  # a status, no connection, a time-out, no HTTP
        reason = getattr(error, "code", None) or getattr(error, "reason", None) or type(error).__name__
        raise ValueError(f"the video could not be downloaded ({reason}); check the URL, or send the video.") from None
    return bytes(body)


def read_video(inputs: str | bytes) -> bytes:
    """The bytes of the video that a request holds. Raises ValueError for anything else, and for too many bytes."""
    if isinstance(inputs, (bytes, bytearray)):
        body = bytes(inputs)
    elif not isinstance(inputs, str):
        kind = type(inputs).__name__
        raise ValueError(f"inputs must be one video, as a URL, base64 text or bytes; got {kind}.")
    elif inputs[:8].lower().startswith(("http://", "https://")):
        body = download(inputs)
    else:
        head, comma, text = inputs.partition(",") if inputs.startswith("data:") else ("", "", inputs)
        if comma and not head.endswith(";base64"):
            raise ValueError('a "data:" address must hold base64: data:video/mp4;base64,...')
        if len(text) > MAX_BYTES // 3 * 4 + 4:
            raise ValueError(f"the video is larger than {MAX_BYTES // 2**20} MiB; send a shorter or smaller one.")
        try:
            body = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("inputs are neither a URL nor base64 of a video; encode the file's bytes.") from None
    if not body:
        raise ValueError("inputs are empty; send a video.")
    if len(body) > MAX_BYTES:
        raise ValueError(f"the video is larger than {MAX_BYTES // 2**20} MiB; send a shorter or smaller one.")
    return body


def check_size(body: bytes) -> None:
    """Raise a ValueError for a video longer than `MAX_SECONDS` or larger than `MAX_PIXELS`, and for what is no video.

    The length is taken from the packets, without decoding: headers may lie.
    """
    import av

    seconds, packets = 0.0, 0
    try:
        # No protocol is allowed but the bytes in hand: a playlist could name files of this machine and addresses.
        options = {"protocol_whitelist": ""}
        with av.open(io.BytesIO(body), "r", metadata_errors="ignore", options=options) as container:
            if not container.streams.video:
                raise ValueError("the file holds no video; send one with a picture.")
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise ValueError(f"frames of {stream.width} x {stream.height} are too large; scale the video down.")
            for packet in container.demux(stream):
                packets += packet.size > 0
                if packet.pts is not None and packet.time_base is not None:
                    seconds = max(seconds, float(packet.pts * packet.time_base))
                if max(seconds, packets / 120) > MAX_SECONDS:  # no more than 120 frames a second without times
                    raise ValueError(f"the video is longer than the {MAX_SECONDS:.0f} s that are taken; cut it.")
    except av.FFmpegError:
        raise ValueError("the bytes are no video that can be read; send a whole mp4, webm, mov or avi file.") from None


class EndpointHandler:
    """Loads the model of the repository at `path` and answers requests."""

    def __init__(self, path: str = ""):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        model = AutoModelForVideoClassification.from_pretrained(path, trust_remote_code=True, dtype=dtype)
        self.model = model.to(self.device).eval()
        with suppress(ValueError):  # quantised or adapted layers have no faster way
            self.model.optimize_for_inference()

    def __call__(self, data: dict) -> list[dict]:
        """Classify one video; raises a one-line ValueError for a bad request."""
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError('a request needs "inputs": a URL, base64 or bytes of a video.')
        parameters = data.get("parameters") or {}
        unknown = sorted(set(parameters) - {"top_k", "function_to_apply"}) if isinstance(parameters, dict) else ["?"]
        if unknown:
            raise ValueError(f"parameters may hold top_k and function_to_apply, got {parameters!r}.")
        top_k, function = parameters.get("top_k", 5), parameters.get("function_to_apply", "softmax")
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k must be a whole number from 1, got {top_k!r}.")
        if not isinstance(function, str) or function not in FUNCTIONS:
            raise ValueError(f"function_to_apply must be one of {', '.join(FUNCTIONS)}, got {function!r}.")
        body = read_video(data["inputs"])
        check_size(body)
        pixel_values = self.processor(body, return_tensors="pt")["pixel_values"]  # a damaged video is a ValueError
        with torch.inference_mode():
            logits = self.model(pixel_values=pixel_values.to(self.device, self.model.dtype)).logits[0].float().cpu()
        scores, classes = FUNCTIONS[function](logits).topk(min(top_k, logits.shape[0]))
        names = self.model.config.id2label
        return [{"label": names[i], "score": s} for s, i in zip(scores.tolist(), classes.tolist(), strict=True)]
