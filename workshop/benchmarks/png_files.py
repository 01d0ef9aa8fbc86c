"""What most versions of this lab read their pictures with: PNGs that PIL opens one by one."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from tqdm import tqdm

from lab7.dataset import ICLEVRDataset


class PNGFolder(torch.utils.data.Dataset):
    """Pictures as files, opened when they are asked for."""

    def __init__(self, files: list[Path], conditions: Tensor):
        self.files, self.conditions = files, conditions
        self.transform = transforms.Compose(
            [
                transforms.Resize((64, 64)),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.5,) * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Image.open(self.files[index]).convert("RGB")
        return self.transform(image), self.conditions[index]


def write_pngs(dataset: ICLEVRDataset, folder: Path, count: int) -> list[Path]:
    """Write the first pictures as 320×240 PNGs."""
    files = [folder / name for name in dataset.names[:count]]
    for file, image in zip(tqdm(files, "writing PNGs", leave=False), dataset.images, strict=False):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture.resize((320, 240), Image.Resampling.BICUBIC).save(file)
    return files
