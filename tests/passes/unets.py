"""U-Nets for tests: SDXL's layout at any width, SD-1.x's, and one that knows no library."""

import torch
from torch import nn


def sdxl(width=8, depths=(1, 1, 2), small=True, **more):
    """The layout of SDXL; ``small`` in everything, else its real sizes."""
    from diffusers import UNet2DConditionModel

    sizes = dict(
        attention_head_dim=(1, 2, 4), cross_attention_dim=8, addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8, norm_num_groups=4, sample_size=8,
    ) if small else dict(
        attention_head_dim=(5, 10, 20), cross_attention_dim=2048, addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 1280, sample_size=128,
    )  # fmt: skip
    options = dict(
        in_channels=4, out_channels=4, layers_per_block=2, use_linear_projection=True,
        block_out_channels=(width, 2 * width, 4 * width), addition_embed_type="text_time",
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=depths,
    ) | sizes | more  # fmt: skip
    return UNet2DConditionModel(**options).eval()


def two(width=8, **more):
    """Two resolutions, one with attention, one step of each stage: the least that has it all."""
    return sdxl(
        depths=(1, 2), block_out_channels=(width, 2 * width), attention_head_dim=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=1,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **more,
    )  # fmt: skip


def sd1(width=8):
    """The layout of Stable Diffusion 1.x: four resolutions, no attention at the lowest."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=8, attention_head_dim=1, norm_num_groups=4,
    ).eval()  # fmt: skip


class Mix(nn.Module):
    """A residual attention written out, with names of its own."""

    def __init__(self, d):
        super().__init__()
        self.ask, self.give = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = self.ask(x).chunk(3, -1)
        return self.give(torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1) @ v)


class Layer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.mix = Mix(d)
        self.net = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        x = x + self.mix(x)
        return x + self.net(x)


class Conv(nn.Module):
    def __init__(self, a, b, depth=0):
        super().__init__()
        self.c, self.layers = nn.Conv2d(a, b, 3, padding=1), nn.ModuleList(map(Layer, [b] * depth))

    def forward(self, x):
        x = torch.relu(self.c(x))
        if len(self.layers):
            y = x.flatten(2).transpose(1, 2)
            for layer in self.layers:
                y = layer(y)
            x = y.transpose(1, 2).reshape(x.shape)
        return x


class OwnUNet(nn.Module):
    """Flat lists, as in the ADM U-Nets: no stage modules, no configuration, other names."""

    def __init__(self):
        super().__init__()
        self.entry = nn.Conv2d(3, 4, 3, padding=1)
        self.left = nn.ModuleList(
            [Conv(4, 4), Conv(4, 4), nn.Conv2d(4, 4, 3, 2, 1), Conv(4, 8, 3), Conv(8, 8, 3)]
        )
        self.bottom = Conv(8, 8, 1)
        self.right = nn.ModuleList(
            [Conv(16, 8, 3), Conv(16, 8, 3), Conv(12, 8, 3), Conv(12, 4), Conv(8, 4), Conv(8, 4)]
        )
        self.bigger = nn.Upsample(scale_factor=2)
        self.exit = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        h = self.entry(x)
        hs = [h]
        for m in self.left:
            h = m(h)
            hs.append(h)
        h = self.bottom(h)
        for m in self.right:
            if hs[-1].shape[2:] != h.shape[2:]:
                h = self.bigger(h)
            h = m(torch.cat([hs.pop(), h], 1))  # the skip comes first
        return self.exit(h)
