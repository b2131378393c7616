"""Handler for Inference Endpoints, copied into a model's repository as `handler.py`.

Request: {"inputs": a video, "parameters": {"top_k": 5, "function_to_apply": "softmax"}}, or the bytes of a video as the
body. The video is a URL (http or https) or base64, with or without the prefix "data:video/mp4;base64,".
Response: [{"label": ..., "score": ...}, ...], best first.

Client errors raise a one-line ValueError, returned as HTTP 400.

Videos are decoded by another process, this file run as a script, with limits of time and memory: one that hangs FFmpeg,
fills the memory or crashes is refused, and the next request gets a new process.
"""

import base64
import binascii
import io
import ipaddress
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
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


REQUIREMENTS = "transformers>=5.17\ntorch>=2.11\nav>=18.1\n"  # requirements.txt in the same repository
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,hevc,m4v,mjpeg,ivf,obu,nut,mxf,yuv4mpegpipe"
MAX_BYTES = 64 * 2**20
MAX_SECONDS = 600.0
MAX_PIXELS = 3840 * 2160  # per frame
TIMEOUT = 30  # seconds for a whole download, but for looking up its host
DECODING_TIMEOUT = 60  # seconds
DECODING_MEMORY = 2 * 2**30  # bytes, above what the process has when it starts
# Public by their numbers, but a cloud's own: IETF's protocol assignments, with Oracle's metadata, and Azure's platform.
PLATFORMS = [ipaddress.ip_network(network) for network in ("192.0.0.0/24", "168.63.129.16/32")]
SECRET = re.compile("TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY", re.IGNORECASE)  # in the name of a variable
FUNCTIONS = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "none": lambda logits: logits,
}


def check_url(url: str) -> None:
    """Raise ValueError unless `url` is http(s) and names a host."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 80)
    except ValueError:  # such as a port that is not a number, or an unclosed bracket
        valid = False
    if not valid:
        raise ValueError(f"the URL must start with http:// or https:// and name a host, got {url[:100]!r}; correct it.")


def is_public(host: str) -> bool:
    """Whether an IP address is on the public internet. An IPv6 address that embeds an IPv4 one is judged by that.

    Stricter than Python's own lists, which change between its patches.
    """
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.version == 6:
        embedded = address.ipv4_mapped or address.sixtofour
        if embedded is None and address in ipaddress.ip_network("64:ff9b::/96"):
            embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if embedded is not None:
            address = embedded
    if address.version == 6 and address not in ipaddress.ip_network("2000::/3"):
        return False  # site-local, IPv4-compatible, local translators and all else that is no unicast address
    refused = any(address in network for network in PLATFORMS if network.version == address.version)
    return address.is_global and not address.is_multicast and not refused


def public_addresses(host: str, port: int) -> list[str]:
    """Resolve `host`. Raises ValueError if it is unknown or any of its addresses is not on the public internet."""
    try:
        addresses = list(dict.fromkeys(info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
    except (OSError, UnicodeError):
        raise ValueError(f"the host must exist, got {host!r}; check the URL.") from None
    if not all(is_public(address) for address in addresses):
        raise ValueError(f"the host must be on the public internet, got {host!r}; send the video itself instead.")
    return addresses


def connect(host: str, port: int, timeout: float) -> socket.socket:
    """Connect to a public address of `host` in `timeout` seconds.

    The connection uses the addresses that were checked: resolving the name again could give others (DNS rebinding).
    """
    failure = OSError("no address")
    end = time.monotonic() + timeout  # for all addresses together
    for address in public_addresses(host, port):
        try:
            return socket.create_connection((address, port), max(end - time.monotonic(), 0.01))
        except OSError as error:
            failure = error
    raise failure


class Deadline:
    """While entered, it ends the connections that it watches after `seconds`, whatever they wait for, and is `late`.

    The time limit of a socket counts from each byte that it gets.
    """

    def __init__(self, seconds: float):
        self.late, self.sockets, self.end = False, [], time.monotonic() + seconds
        self.timer = threading.Timer(seconds, self._end)

    def __enter__(self) -> "Deadline":
        self.timer.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self.timer.cancel()

    def left(self) -> float:
        return max(self.end - time.monotonic(), 0.01)

    def watch(self, sock: socket.socket) -> socket.socket:
        self.sockets.append(sock)
        if self.late:
            raise TimeoutError("too slow")
        return sock

    def _end(self) -> None:
        self.late = True
        for sock in self.sockets:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not TLS's own, which waits for the other side


class _Connection(HTTPConnection):
    def __init__(self, *arguments: Any, deadline: Deadline, **options: Any):
        super().__init__(*arguments, **options)
        self.deadline = deadline

    def connect(self) -> None:
        self.sock = self.deadline.watch(connect(self.host, self.port, self.deadline.left()))


class _SecureConnection(HTTPSConnection):
    def __init__(self, *arguments: Any, deadline: Deadline, **options: Any):
        super().__init__(*arguments, **options)
        self.deadline = deadline

    def connect(self) -> None:
        # The certificate is checked against the name, not the address.
        sock, context = connect(self.host, self.port, self.deadline.left()), ssl.create_default_context()
        sock = context.wrap_socket(sock, server_hostname=self.host, do_handshake_on_connect=False)
        self.sock = self.deadline.watch(sock)
        self.sock.do_handshake()


class _Handler(HTTPHandler):
    def __init__(self, deadline: Deadline):
        super().__init__()
        self.deadline = deadline

    def http_open(self, request: Request) -> HTTPResponse:
        return self.do_open(_Connection, request, deadline=self.deadline)


class _SecureHandler(HTTPSHandler):
    def __init__(self, deadline: Deadline):
        super().__init__()
        self.deadline = deadline

    def https_open(self, request: Request) -> HTTPResponse:
        return self.do_open(_SecureConnection, request, deadline=self.deadline)


class _Redirects(HTTPRedirectHandler):
    def redirect_request(self, request: Request, *arguments: Any) -> Request | None:
        redirected = super().redirect_request(request, *arguments)
        if redirected is not None:
            check_url(redirected.full_url)
        return redirected


def _too_large() -> ValueError:
    return ValueError(f"the video must have at most {MAX_BYTES // 2**20} MiB, got more; send a shorter or smaller one.")


def download(url: str) -> bytes:
    """Download `url`; stops after more than `MAX_BYTES`. Raises ValueError if that fails."""
    check_url(url)
    body, deadline = bytearray(), Deadline(TIMEOUT)
    # Quote like a browser: what is already quoted stays.
    request = Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers={"User-Agent": "hf_inti"})
    # No proxies: they would resolve the host themselves, unchecked.
    opener = build_opener(ProxyHandler({}), _Handler(deadline), _SecureHandler(deadline), _Redirects)
    try:
        with deadline, opener.open(request, timeout=TIMEOUT) as response:
            if (response.length or 0) > MAX_BYTES:  # it says so itself
                raise _too_large()
            while len(body) <= MAX_BYTES and (chunk := response.read1(2**20)):
                body += chunk
            if deadline.late:
                raise TimeoutError("too slow")
    except (OSError, HTTPException, UnicodeError) as error:  # bad status, no connection, timeout, not HTTP
        reason = getattr(error, "code", None) or getattr(error, "reason", None) or type(error).__name__
        reason = f"more than {TIMEOUT} s" if deadline.late else reason
        raise ValueError(f"the URL must be downloadable, got {reason}; check it, or send the video itself.") from None
    return bytes(body)


def read_video(inputs: str | bytes) -> bytes:
    """Get the video's bytes from a request's inputs. Raises ValueError if there is no video or it is too large."""
    if isinstance(inputs, (bytes, bytearray)):
        body = bytes(inputs)
    elif not isinstance(inputs, str):
        kind = type(inputs).__name__
        raise ValueError(f"inputs must be one video, as a URL, base64 text or bytes, got {kind}; send one of these.")
    elif inputs[:8].lower().startswith(("http://", "https://")):
        body = download(inputs)
    else:
        head, comma, text = inputs.partition(",") if inputs.startswith("data:") else ("", "", inputs)
        if comma and not head.endswith(";base64"):
            raise ValueError('a "data:" URL must hold base64, got another encoding; send data:video/mp4;base64,...')
        if len(text) > MAX_BYTES // 3 * 4 + 4:
            raise _too_large()
        try:
            body = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("inputs must be a URL or base64, got other text; encode the file's bytes.") from None
    if not body:
        raise ValueError("inputs must hold a video, got nothing; send one.")
    if len(body) > MAX_BYTES:
        raise _too_large()
    return body


def check_size(body: bytes, max_seconds: float, max_pixels: int) -> None:
    """Raise ValueError for a video that is longer, or has more pixels in a frame, or if it is not a video.

    The duration comes from the packets, which are not decoded; headers may be wrong.
    """
    import av

    packets, starts = Counter(), {}  # of each stream; recordings may start at any time
    try:
        # No other protocols: a playlist could otherwise read local files or the network.
        options = {"protocol_whitelist": "", "format_whitelist": CONTAINERS}
        with av.open(io.BytesIO(body), "r", metadata_errors="ignore", options=options) as container:
            streams = [stream for stream in container.streams.video if stream.codec_context]  # those with a decoder
            if not streams:
                raise ValueError("the file must have a video stream, got none; send another.")
            largest = max(streams, key=lambda stream: stream.width * stream.height)
            if largest.width * largest.height > max_pixels:
                raise ValueError(
                    f"frames must have at most {max_pixels} pixels, got {largest.width} x {largest.height}; "
                    "scale the video down."
                )
            for packet in container.demux(streams):
                index, seconds = packet.stream.index, 0.0
                packets[index] += packet.size > 0
                if packet.pts is not None and packet.time_base is not None:
                    seconds = abs(float((packet.pts - starts.setdefault(index, packet.pts)) * packet.time_base))
                # Timestamps may be missing: assume at most 120 frames per second.
                if max(seconds, packets[index] / 120) > max_seconds:
                    raise ValueError(f"the video must last at most {max_seconds:.0f} s, got more; cut it.")
    except IndexError:
        pass  # PyAV's, after the last packet, where a stream begins in the middle of the file
    except av.FFmpegError:
        raise ValueError(
            "inputs must be a readable video, got other bytes; send a whole mp4, webm, mov or avi file."
        ) from None


class Decoder:
    """A process that turns videos into pixels.

    It answers in JSON and plain numbers, so that a hijacked one can run nothing here. Variables named like secrets are
    kept from it.
    """

    def __init__(self, *script: str):
        """`script`: a Python file that calls `answer_requests`, and its arguments. The first video starts it."""
        self.script, self.lock, self.process = script, threading.Lock(), None

    def __call__(self, body: bytes, **request: object) -> torch.Tensor:
        """Pixels (1, T, 3, H, W) of a video; the script gets `request`, plain values, with it.

        Raises a one-line ValueError for a video that cannot be decoded.
        """
        with self.lock:
            self.start()
            end = time.monotonic() + DECODING_TIMEOUT
            timer = threading.Timer(DECODING_TIMEOUT, self.process.kill)  # ends the wait below, too
            timer.start()
            try:
                answer, pixels = self._ask(body, request)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError):
                self.close()
                reason = f"more than {DECODING_TIMEOUT} s" if time.monotonic() >= end else "a crash"
                raise ValueError(f"the video must be decodable, got {reason}; send another.") from None
            finally:
                timer.cancel()
        if pixels is None:
            raise ValueError(str(answer["error"]))
        return pixels

    def start(self) -> None:
        """Start the process unless it runs; returns when it is ready, for loading is not a video's time."""
        if self.process is not None and self.process.poll() is None:
            return
        self.close()
        environment = {name: value for name, value in os.environ.items() if not SECRET.search(name)}
        environment["PYTHONSAFEPATH"] = "1"  # modules of the repository must not hide Python's own
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, *self.script], env=environment, **pipes)
        if not self.process.stdout.readline():
            raise RuntimeError("the decoding process must start, got its end; see its message above.")

    def _ask(self, body: bytes, request: dict) -> tuple[dict, torch.Tensor | None]:
        """The process's answer, and its pixels unless that is an error."""
        head = {"bytes": len(body), "memory": DECODING_MEMORY, "request": request}
        self.process.stdin.write(json.dumps(head).encode() + b"\n")
        self.process.stdin.write(body)
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline(10_000))
        if "error" in answer:
            return answer, None
        data = bytearray(self.process.stdout.read(max(0, min(answer["bytes"], DECODING_MEMORY))))
        return answer, torch.frombuffer(data, dtype=torch.float32).view(answer["shape"])

    def close(self) -> None:
        """End the process; the next video starts another."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        with suppress(OSError):  # what was not sent yet
            self.process.stdin.close()
        self.process.stdout.close()

    def __del__(self):
        self.close()


@contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """Let this process take `more` bytes than it has; where the system has no such limit, there is none."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size + more, before[1]))
    except (ImportError, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def answer_requests(load: Callable[[], Callable[..., torch.Tensor]]) -> None:
    """What a decoder's script does: a line of JSON and a video come on stdin, a line and its pixels go to stdout.

    `load()` gives the function from a video's bytes, and the request as keywords, to its pixels; its ValueErrors are
    answers.
    """
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)  # memory for threads counts too
    import av  # noqa: F401  # now: its memory is not the video's

    read = load()
    answers.write(b"{}\n")
    answers.flush()
    while line := requests.readline():
        head = json.loads(line)
        body, data = requests.read(head["bytes"]), b""
        try:
            with limited_memory(head["memory"]):
                pixels = read(body, **head["request"]).float().contiguous()
                data = pixels.numpy().tobytes()
            answer = {"shape": list(pixels.shape), "bytes": len(data)}
        except (MemoryError, RuntimeError):  # torch's allocator raises the second
            answer = {
                "error": "the video must be decodable in the memory of this server, got more; send a smaller one."
            }
        except ValueError as error:
            answer = {"error": " ".join(str(error).split())[:1000]}
        answers.write(json.dumps(answer).encode() + b"\n" + data)
        answers.flush()


def load_reader(path: str) -> Callable[..., torch.Tensor]:
    """For `answer_requests`: the processor at `path`."""
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)

    def read(body: bytes, seconds: float, pixels: int) -> torch.Tensor:
        check_size(body, seconds, pixels)
        return processor(body, return_tensors="pt")["pixel_values"]

    return read


class EndpointHandler:
    """Loads the model in the repository at `path` and answers requests, on the GPU if there is one."""

    def __init__(self, path: str = ""):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        self.decode = Decoder(os.path.abspath(__file__), path)
        self.decode.start()
        options = {"trust_remote_code": True, "use_safetensors": True, "dtype": dtype}
        model = AutoModelForVideoClassification.from_pretrained(path, **options)
        self.model = model.to(self.device).eval()
        with suppress(ValueError):  # quantised or adapted layers have no faster path
            self.model.optimize_for_inference()

    def __call__(self, data: dict) -> list[dict]:
        """Classify one video. Raises a one-line ValueError for a bad request."""
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError('a request must have "inputs", got none; send a URL, base64 or bytes of a video.')
        parameters = data.get("parameters") or {}
        unknown = sorted(set(parameters) - {"top_k", "function_to_apply"}) if isinstance(parameters, dict) else ["?"]
        if unknown:
            raise ValueError(f"parameters must be a mapping of top_k and function_to_apply, got {parameters!r}.")
        top_k, function = parameters.get("top_k", 5), parameters.get("function_to_apply", "softmax")
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k must be a whole number of at least 1, got {top_k!r}; correct it.")
        if not isinstance(function, str) or function not in FUNCTIONS:
            raise ValueError(f"function_to_apply must be one of {', '.join(FUNCTIONS)}, got {function!r}; correct it.")
        pixel_values = self.decode(read_video(data["inputs"]), seconds=MAX_SECONDS, pixels=MAX_PIXELS)
        with torch.inference_mode():
            logits = self.model(pixel_values=pixel_values.to(self.device, self.model.dtype)).logits[0].float().cpu()
        scores, classes = FUNCTIONS[function](logits).topk(min(top_k, logits.shape[0]))
        names = self.model.config.id2label
        return [{"label": names[i], "score": s} for s, i in zip(scores.tolist(), classes.tolist(), strict=True)]


if __name__ == "__main__":
    answer_requests(partial(load_reader, sys.argv[1]))
