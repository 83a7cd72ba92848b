"""Teacher outputs, computed once."""

import bisect

import inspect

import itertools

import os

import shutil

import zlib

from collections.abc import Iterable, Iterator, Sequence

from pathlib import Path

import numpy as np

import skimage

import torch

from PIL import Image

from torch import Tensor, nn

from torch.utils.data import DataLoader, Dataset

from tqdm import tqdm

import estimator

from checkpoints import fingerprint

from degradations import Mixture, random_degradation

from files import growing_file, read_torch_file, write_torch_file, atomic_write

from estimator import log_power_spectrum, transform_spectrum

from models import run_tiled

from patches import as_batch, crop_and_augment, sample_index, generator_of, random_window, to_pixels, to_tensor

from photos import DecodedPhotos, PixelFile, list_problems, read_photo, remove_files

from processes import rank, print0, per_rank_batch_size

from utils import UserError, autocast, autocast_dtype
