"""A CIFAR ResNet-20 in plain torch, and what the numbers in `vectors/zipit_e2e_resnet20_w025.npz` mean.

The file holds two ResNet-20 of width .25 (4, 8 and 16 channels; `A.*`, `B.*`), inputs `x`, and the published code's
merges of the two. Found by running this network and comparing (`test_resnet20_vector.py` repeats it):

- The network has 3x3 convolutions with padding 1 and no bias everywhere, *also in the shortcuts* of `layer2.0` and
  `layer3.0` (convolution of stride 2 and BatchNorm); the shortcut is added after `bn2`, and ReLU follows.
- `node{n}.cov` is the population covariance, in eval mode, over samples and positions of all of `x`, of

  | node | observed at | space |
  |---|---|---|
  | 5, 11, 17 | `layer1.{0,1,2}` after `relu(bn1(conv1))`: the input of `conv2` | inside the block |
  | 21 | the output of `layer1.2`, after the addition and ReLU | stream of stage 1, with the stem |
  | 26, 32, 38 | `layer2.{0,1,2}` likewise | inside the block |
  | 42 | the output of `layer2.2` | stream of stage 2, with its shortcut |
  | 47, 53, 59 | `layer3.{0,1,2}` likewise | inside the block |
  | 63 | the output of `layer3.2`, before the average pooling | stream of stage 3, read by `linear` |

  So a stream is observed at ONE place, the end of its stage, not at every addition.
- `{tag}.node{n}.merge` is 2 M_t side by side (k x 2d, divided by |group| + 1e-5), `unmerge` the U_t stacked.
- `{tag}.merged.*` is the mean over A and B of (2 M_t W_t U_t), BatchNorm's running variance included. `{tag}.out` is
  the merged network in eval mode on `x[:8]`. The linear layer's classes are averaged, not concatenated.
- Partitions with little budget (`zip_a.3_b.125`, `zip_a1e-4_b.075`) need `compat`: with 4 channels the budget is 0,
  and the published code lets one join inside each expert through.
- In node 63 the zip partitions hang on two correlations 2e-7 apart (units 14 and 20 with 31), less than what another
  order of summation in the convolutions makes: take the file's covariances to get the file's partitions.
- `zip_partial21` merges the spaces of nodes 5 to 21 only, two heads remain: `out` is [2, 8, 10].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

SPACES = {f"{5 + 21 * stage + 6 * block}": f"layer{stage + 1}.{block}" for stage in range(3) for block in range(3)} | {
    f"{21 * (stage + 1)}": f"layer{stage + 1}" for stage in range(3)
}
"""By node: the block whose inner channels it observes, or the stage whose stream."""


class Block(nn.Module):
    """Two convolutions and a shortcut: relu(bn2(conv2(relu(bn1(conv1 x)))) + shortcut x)."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class ResNet20(nn.Module):
    """Images `[batch, 3, 32, 32]` to logits `[batch, classes]`; `width` channels in the first stage."""

    def __init__(self, width: int = 4, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, 1)
        self.layer2 = self._stage(width, 2 * width, 2)
        self.layer3 = self._stage(2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, classes)

    @staticmethod
    def _stage(channels: int, width: int, stride: int) -> nn.Sequential:
        return nn.Sequential(Block(channels, width, stride), Block(width, width, 1), Block(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))
