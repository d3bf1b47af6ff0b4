"""A dataset as TensorFlow Datasets keeps it, built on the spot and without TensorFlow."""

import importlib.resources.abc
import pathlib
import sys

import numpy as np
import pytest

RECORDS = [{"text": f"é {number}\n", "number": number, "nested": {"tags": ["a", "b"][:number % 3]},
            "turns": [{"role": "user", "content": "hi"}] * (number % 3)} for number in range(600)]


def build_tfds(folder: pathlib.Path) -> None:
    """`tfds:toy/small:1.2.0?data_dir=FOLDER`, its split `train` all RECORDS and `test` the first three."""
    import tensorflow_datasets as tfds

    features = tfds.features

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.0")
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="small"), tfds.core.BuilderConfig(name="large"))

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=features.FeaturesDict({
                "text": features.Text(), "number": features.Scalar(np.int64),
                "nested": {"tags": features.Sequence(features.Text())},
                "turns": features.Sequence({"role": features.Text(), "content": features.Text()})}))

        def _split_generators(self, _):
            return {"train": enumerate(RECORDS), "test": enumerate(RECORDS[:3])}

        def _generate_examples(self):
            raise NotImplementedError

    tfds.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:  # tfds needs the backport to build, and does not require it
        patch.setitem(sys.modules, "importlib_resources", importlib.resources)
        Toy(data_dir=folder, config="small", file_format="array_record").download_and_prepare()
