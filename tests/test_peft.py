"""LoRA through peft: adapters on CLIP's attention, InTI's modules and the head trained in full."""

import pytest
import torch

from hf_inti import InTIClipForVideoClassification


peft = pytest.importorskip("peft", reason="peft is not installed")


def lora(model):
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4,
            target_modules=["q_proj", "k_proj", "v_proj", "out_proj"],
            modules_to_save=["compression", "classifier"],
        ),
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_lora_trains_saves_and_loads(tiny_config, tmp_path):
    base = InTIClipForVideoClassification(tiny_config(compression_layers=[1, 3]))
    base.save_pretrained(tmp_path / "base")
    model = lora(InTIClipForVideoClassification.from_pretrained(tmp_path / "base"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or ".modules_to_save." in name for name in trained)
    assert any("compression" in name and "P" in name for name in trained)
    pixel_values, labels = torch.randn(4, 8, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(pixel_values=pixel_values, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.eval().save_pretrained(tmp_path / "lora")
    again = InTIClipForVideoClassification.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "lora").eval()
    with torch.no_grad():
        wanted = model(pixel_values=pixel_values).logits
        torch.testing.assert_close(again(pixel_values=pixel_values).logits, wanted, rtol=0, atol=1e-6)
        merged = again.merge_and_unload()
        assert isinstance(merged, InTIClipForVideoClassification)
        torch.testing.assert_close(merged(pixel_values=pixel_values).logits, wanted, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = InTIClipForVideoClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values=pixel_values).logits, wanted, rtol=0, atol=1e-4)
