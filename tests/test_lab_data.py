"""Data sets and batches: what is read is what was stored, and (seed, epoch) decides everything else."""

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decay_pruning.errors import ConfigError, DataError
from decay_pruning.lab import data as lab
from decay_pruning.lab.data import Batches, FolderData, ImageData

Image = pytest.importorskip("PIL.Image")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    data = lab.load("digits")
    assert isinstance(data, ImageData)
    return data


def toy(count: int = 40, channels: int = 3, size: int = 8, tests: int = 10) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (count + tests, channels, size, size), dtype=torch.uint8, generator=generator)
    y = torch.arange(count + tests) % 5
    mean, std = torch.full((channels,), 0.5), torch.full((channels,), 0.25)
    return ImageData("toy", x[:count], y[:count], x[count:], y[count:], mean, std, tuple("abcde"))


def back(x: torch.Tensor, data: ImageData) -> torch.Tensor:
    """Normalised images → uint8."""
    mean, std = data.mean.view(1, -1, 1, 1), data.std.view(1, -1, 1, 1)
    return ((x * std + mean) * 255).round().byte()


class TestDigits:
    def test_split_is_stratified_and_complete(self, digits: ImageData) -> None:
        from sklearn.datasets import load_digits

        assert digits.train_x.shape == (1437, 1, 8, 8) and digits.test_x.shape == (360, 1, 8, 8)
        assert digits.shape == (1, 8, 8) and len(digits.classes) == 10
        both = torch.cat([digits.train_y, digits.test_y]).bincount()
        assert (digits.test_y.bincount() - both / 5).abs().max() <= 1
        original = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
        ours = torch.cat([digits.train_x, digits.test_x])[:, 0].numpy()
        assert sorted(i.tobytes() for i in ours) == sorted(i.tobytes() for i in original)

    def test_moments_are_those_of_the_training_images(self, digits: ImageData) -> None:
        pixels = digits.train_x.double() / 255
        torch.testing.assert_close(digits.mean[0].double(), pixels.mean(), rtol=1e-5, atol=0)
        torch.testing.assert_close(digits.std[0].double(), pixels.std(correction=0), rtol=1e-5, atol=0)

    def test_limits_and_size(self) -> None:
        data = lab.load("digits", size=4, train_limit=100, test_limit=30)
        assert isinstance(data, ImageData)
        assert data.train_x.shape == (100, 1, 4, 4) and len(data.test_y) == 30
        full = lab.load("digits")
        assert isinstance(full, ImageData)
        block = full.train_x[0, 0, :2, :2].float().mean().round()
        assert data.train_x[0, 0, 0, 0] == block
        assert "4×4" in data.note and "100 training" in data.note

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"spec": "cifar"}, "did you mean 'cifar10'"),
            ({"spec": "digits", "size": 9}, "nothing is scaled up"),
            ({"spec": "digits", "size": 0}, "size must be at least 1"),
            ({"spec": "digits", "train_limit": -3}, "train_limit"),
        ],
    )
    def test_wrong_arguments(self, arguments: dict[str, object], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            lab.load(**arguments)


class TestPickledBatches:
    @staticmethod
    def write(folder: Path, per_batch: int = 4) -> tuple[np.ndarray, list[int]]:
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (6 * per_batch, 3072), dtype=np.uint8)
        labels = rng.integers(0, 10, 6 * per_batch).tolist()
        folder.mkdir(parents=True, exist_ok=True)
        for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
            part = slice(i * per_batch, (i + 1) * per_batch)
            content = {b"data": pixels[part], b"labels": labels[part], b"batch_label": b"some"}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return pixels, labels

    @pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
    def test_reads_what_was_written(self, tmp_path: Path, below: str) -> None:
        pixels, labels = self.write(tmp_path / below)
        data = lab.load("cifar10", root=tmp_path)
        assert isinstance(data, ImageData)
        assert data.name == "CIFAR-10" and data.classes[3] == "cat"
        np.testing.assert_array_equal(data.train_x.numpy(), pixels[:20].reshape(-1, 3, 32, 32))
        assert data.train_y.tolist() == labels[:20] and data.test_y.tolist() == labels[20:]
        assert data.test_x.dtype == torch.uint8 and data.test_y.dtype == torch.int64

    def test_a_missing_batch(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        (tmp_path / "data_batch_4").unlink()
        with pytest.raises(DataError, match=r"incomplete.*data_batch_4"):
            lab.load("cifar10", root=tmp_path)

    def test_a_truncated_batch(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        file = tmp_path / "test_batch"
        file.write_bytes(file.read_bytes()[:5000])
        with pytest.raises(DataError, match=r"test_batch.*damaged"):
            lab.load("cifar10", root=tmp_path)

    def test_code_in_a_batch_does_not_run(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, ...]:
                return os.mkdir, (str(tmp_path / "ran"),)

        self.write(tmp_path)
        (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil(), b"labels": [1]}, protocol=2))
        with pytest.raises(DataError, match="does not belong"):
            lab.load("cifar10", root=tmp_path)
        assert not (tmp_path / "ran").exists()

    def test_labels_out_of_range(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        content = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}
        (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(DataError, match="found 10"):
            lab.load("cifar10", root=tmp_path)


class TestParquet:
    @staticmethod
    def write(folder: Path, kind: str = "PNG", size: int = 32) -> np.ndarray:
        rng = np.random.default_rng(1)
        pixels = rng.integers(0, 256, (12, size, size, 3), dtype=np.uint8)
        names = ["plane", "bird", "cat"]
        features = {"img": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        folder.mkdir(exist_ok=True)
        for part, rows in (("train", range(9)), ("test", range(9, 12))):
            cells = []
            for i in rows:
                buffer = io.BytesIO()
                Image.fromarray(pixels[i]).save(buffer, kind)
                cells.append({"bytes": buffer.getvalue(), "path": f"{i}.x"})
            kinds = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            table = pa.table({"img": pa.array(cells, kinds), "label": [i % 3 for i in rows]})
            pq.write_table(table.replace_schema_metadata(metadata), folder / f"{part}-00000-of-00001.parquet")
        return pixels

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return tmp_path / "cache" / "decay-pruning"

    def test_decoded_once_and_exactly(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pixels = self.write(tmp_path / "set")
        first = lab.load("cifar10", root=tmp_path / "set")
        monkeypatch.setattr(lab, "_decode_parquet", lambda _: pytest.fail("decoded a second time"))
        second = lab.load("cifar10", root=tmp_path / "set")
        for data in (first, second):
            assert isinstance(data, ImageData)
            assert data.name == "CIFAR-10" and data.classes == ("plane", "bird", "cat")
            np.testing.assert_array_equal(data.train_x.permute(0, 2, 3, 1).numpy(), pixels[:9])
            assert data.test_y.tolist() == [0, 1, 2]

    def test_jpeg_is_named(self, tmp_path: Path) -> None:
        self.write(tmp_path / "data", "JPEG")
        assert lab.load("cifar10", root=tmp_path).name == "CIFAR-10 (JPEG)"

    def test_new_files_are_decoded_anew(self, tmp_path: Path) -> None:
        self.write(tmp_path / "set", size=32)
        lab.load("cifar10", root=tmp_path / "set")
        self.write(tmp_path / "set", size=16)
        assert lab.load("cifar10", root=tmp_path / "set").shape == (3, 16, 16)

    def test_a_damaged_cache_is_made_anew(
        self, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = tmp_path / "set"
        pixels = self.write(folder)
        lab.load("cifar10", root=folder)
        for file in cache.glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:100])
        data = lab.load("cifar10", root=folder)
        assert isinstance(data, ImageData)
        assert "damaged" in caplog.text
        np.testing.assert_array_equal(data.test_x.permute(0, 2, 3, 1).numpy(), pixels[9:])

    def test_the_folder_of_the_data_is_left_alone(self, tmp_path: Path) -> None:
        self.write(tmp_path / "set")
        before = sorted(f.name for f in (tmp_path / "set").iterdir())
        lab.load("cifar10", root=tmp_path / "set")
        assert sorted(f.name for f in (tmp_path / "set").iterdir()) == before

    def test_no_cache_is_no_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.write(tmp_path / "set")
        blocked = tmp_path / "file"
        blocked.touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
        assert lab.load("cifar10", root=tmp_path / "set").name == "CIFAR-10"
        assert "cannot cache" in caplog.text

    def test_a_truncated_file(self, tmp_path: Path) -> None:
        self.write(tmp_path / "set")
        file = next((tmp_path / "set").glob("test-*"))
        file.write_bytes(file.read_bytes()[:-50])
        with pytest.raises(DataError, match=r"test-00000.*damaged"):
            lab.load("cifar10", root=tmp_path / "set")

    def test_a_damaged_image_is_named_by_its_row(self, tmp_path: Path) -> None:
        self.write(tmp_path / "set")
        file = next((tmp_path / "set").glob("train-*"))
        rows = pq.read_table(file).to_pylist()
        rows[5]["img"]["bytes"] = rows[5]["img"]["bytes"][:60]
        pq.write_table(pa.Table.from_pylist(rows), file)
        with pytest.raises(DataError, match="row 5"):
            lab.load("cifar10", root=tmp_path / "set")

    def test_other_columns(self, tmp_path: Path) -> None:
        self.write(tmp_path / "set")
        pq.write_table(pa.table({"picture": [1]}), next((tmp_path / "set").glob("train-*")))
        with pytest.raises(DataError, match=r"picture.*expected 'img'"):
            lab.load("cifar10", root=tmp_path / "set")


@pytest.mark.parametrize("spec", ["cifar10", "imagefolder"])
def test_missing_data(tmp_path: Path, spec: str) -> None:
    with pytest.raises(DataError, match="give its path"):
        lab.load(spec)
    with pytest.raises(DataError, match="there is no folder"):
        lab.load(spec, root=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"expected|must hold"):
        lab.load(spec, root=tmp_path)


class TestImageFolder:
    @staticmethod
    def write(root: Path) -> None:
        rng = np.random.default_rng(2)
        for part, count in (("train", 5), ("val", 2)):
            for label, name in enumerate(("ant", "bee")):
                folder = root / part / name
                folder.mkdir(parents=True)
                for i in range(count):
                    array = rng.integers(100 * label, 100 * label + 50, (20 + i, 30, 3), dtype=np.uint8)
                    Image.fromarray(array).save(folder / f"{i}.png")

    @pytest.fixture
    def folder(self, tmp_path: Path) -> FolderData:
        self.write(tmp_path)
        data = lab.load("imagefolder", root=tmp_path, size=16)
        assert isinstance(data, FolderData)
        return data

    def test_labels_follow_folders(self, folder: FolderData) -> None:
        assert folder.classes == ("ant", "bee") and folder.shape == (3, 16, 16)
        assert folder.train_y.tolist() == [0] * 5 + [1] * 5 and len(folder.test_files) == 4
        x, y = next(iter(Batches(folder, 4, train=False)))
        assert x.shape == (4, 3, 16, 16) and y.tolist() == [0, 0, 1, 1]
        brightness = (x * folder.std.view(1, 3, 1, 1) + folder.mean.view(1, 3, 1, 1)).mean((1, 2, 3)) * 255
        assert brightness[:2].max() < 60 and brightness[2:].min() > 90

    def test_decoding_depends_on_seed_and_epoch_only(self, folder: FolderData) -> None:
        def images(seed: int, epoch: int, workers: int = 0) -> torch.Tensor:
            batches = Batches(folder, 5, seed, augment=("crop", "flip"), workers=workers)
            return torch.cat([x for x, _ in batches.epoch(epoch)])

        first = images(0, 0)
        assert torch.equal(first, images(0, 0)) and torch.equal(first, images(0, 0, workers=1))
        assert not torch.equal(first, images(0, 1)) and not torch.equal(first, images(1, 0))

    def test_a_limit_keeps_all_classes(self, folder: FolderData) -> None:
        root = Path(folder.train_files[0]).parents[2]
        few = lab.load("imagefolder", root=root, size=16, train_limit=4)
        assert isinstance(few, FolderData) and few.train_y.tolist() == [0, 0, 1, 1]

    def test_a_strange_test_class(self, folder: FolderData) -> None:
        root = Path(folder.train_files[0]).parents[2]
        (root / "val" / "cow").mkdir()
        with pytest.raises(DataError, match="cow"):
            lab.load("imagefolder", root=root)

    def test_a_file_that_is_no_image(self, folder: FolderData) -> None:
        Path(folder.test_files[0]).write_bytes(b"no image")
        with pytest.raises(DataError, match="cannot decode"):
            list(Batches(folder, 2, train=False))


class TestSplit:
    def test_holds_out_a_share_of_each_class(self, digits: ImageData) -> None:
        held = lab.split(digits, 0.25, seed=3)
        assert len(held.test_y) == 359 and len(held.train_y) == 1437 - 359
        assert (held.test_y.bincount() - digits.train_y.bincount() * 0.25).abs().max() <= 1
        before = sorted(x.numpy().tobytes() for x in digits.train_x)
        after = sorted(x.numpy().tobytes() for x in torch.cat([held.train_x, held.test_x]))
        assert before == after
        assert "validation" in held.name

    def test_the_seed_chooses(self, digits: ImageData) -> None:
        first, again, other = (lab.split(digits, 0.2, seed=s).test_x for s in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -1, 2])
    def test_impossible_fractions(self, digits: ImageData, fraction: float) -> None:
        with pytest.raises(ConfigError, match="between 0 and 1"):
            lab.split(digits, fraction, seed=0)


class TestBatches:
    def test_training_batches_are_equal_in_size_and_never_repeat_an_image(self) -> None:
        data = toy(43)
        batches = Batches(data, 10, seed=1)
        parts = [back(x, data) for x, _ in batches.epoch(0)]
        assert len(parts) == len(batches) == 4 and all(len(p) == 10 for p in parts)
        images = {i.numpy().tobytes() for i in torch.cat(parts)}
        assert len(images) == 40 and images <= {i.numpy().tobytes() for i in data.train_x}

    def test_test_batches_are_complete_and_in_order(self) -> None:
        data = toy(tests=10)
        batches = Batches(data, 4, train=False, augment=("crop", "flip"))
        assert len(batches) == 3
        assert torch.equal(back(torch.cat([x for x, _ in batches]), data), data.test_x)
        assert torch.equal(torch.cat([y for _, y in batches]), data.test_y)

    def test_images_keep_their_labels(self) -> None:
        data = toy()
        label = {x.numpy().tobytes(): int(y) for x, y in zip(data.train_x, data.train_y, strict=True)}
        for x, y in Batches(data, 8, seed=5).epoch(2):
            assert [label[i.numpy().tobytes()] for i in back(x, data)] == y.tolist()

    def test_seed_and_epoch_decide(self) -> None:
        def epoch(seed: int, number: int) -> torch.Tensor:
            batches = Batches(toy(), 8, seed, augment=("crop", "flip"))
            return torch.cat([x for x, _ in batches.epoch(number)])

        torch.manual_seed(1)
        first = epoch(0, 3)
        torch.manual_seed(2)
        assert torch.equal(first, epoch(0, 3))
        assert not torch.equal(first, epoch(0, 4)) and not torch.equal(first, epoch(1, 3))

    def test_processes_share_a_batch_out(self) -> None:
        whole = next(Batches(toy(), 8, 7, augment=("crop",)).epoch(1))[0]
        parts = [next(Batches(toy(), 8, 7, augment=("crop",), rank=r, world=2).epoch(1))[0] for r in (0, 1)]
        assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)

    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.integers(0, 2**20))
    def test_crop_and_flip_agree_with_a_plain_loop(self, c: int, h: int, w: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(0, 256, (6, c, h, w), dtype=torch.uint8, generator=generator)
        pad = (1, 2)
        top = torch.randint(0, 3, (6,), generator=generator)
        left = torch.randint(0, 5, (6,), generator=generator)
        flip = torch.randint(0, 2, (6,), generator=generator)
        result = lab._crop_and_flip(x, pad, top, left, flip)
        for b in range(6):
            padded = torch.zeros(c, h + 2, w + 4, dtype=torch.uint8)
            padded[:, 1 : h + 1, 2 : w + 2] = x[b]
            crop = padded[:, top[b] : top[b] + h, left[b] : left[b] + w]
            assert torch.equal(result[b], crop.flip(-1) if flip[b] else crop)

    def test_crops_move_and_flips_mirror_about_half_of_the_images(self) -> None:
        data = toy(400, size=8)
        x = torch.cat([back(x, data) for x, _ in Batches(data, 400, augment=("flip",)).epoch(0)])
        originals = {i.numpy().tobytes() for i in data.train_x}
        same = sum(i.numpy().tobytes() in originals for i in x)
        mirrored = sum(i.numpy().tobytes() in originals for i in x.flip(-1))
        assert same + mirrored == 400 and 150 < same < 250

    def test_normalisation(self) -> None:
        data = toy()
        x, _ = next(iter(Batches(data, 10, train=False)))
        torch.testing.assert_close(x, (data.test_x / 255 - 0.5) / 0.25)

    @pytest.mark.parametrize("augment", [(), ("crop", "flip")])
    def test_memory_format(self, augment: tuple[str, ...]) -> None:
        """One channel too: strides that fit both formats would put a model into the wrong one."""
        plain, _ = next(iter(Batches(toy(channels=1), 8, augment=augment)))
        assert plain.stride() == (64, 64, 8, 1)
        last, _ = next(iter(Batches(toy(), 8, augment=augment, channels_last=True)))
        assert last.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"batch_size": 41}, "41 must divide"),
            ({"batch_size": 0}, "at least 1"),
            ({"batch_size": 9, "world": 2}, r"processes \(2\)"),
            ({"batch_size": 8, "augment": ("crop", "rotate")}, "unknown augmentation 'rotate'"),
        ],
    )
    def test_wrong_settings(self, arguments: dict[str, object], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            Batches(toy(), **arguments)


@pytest.mark.slow
def test_the_real_cifar10_if_it_is_there() -> None:
    default = Path(__file__).parents[1].parent / "shared" / "data" / "cifar10"
    root = Path(os.environ.get("DECAY_PRUNING_CIFAR10", default))
    if not root.is_dir():
        pytest.skip("no CIFAR-10: set DECAY_PRUNING_CIFAR10 to its folder")
    data = lab.load("cifar10", root=root)
    assert isinstance(data, ImageData)
    assert data.train_x.shape == (50_000, 3, 32, 32) and data.test_x.shape == (10_000, 3, 32, 32)
    assert data.train_y.bincount().tolist() == [5000] * 10 and data.classes[0] == "airplane"
    torch.testing.assert_close(data.mean, torch.tensor([0.4913, 0.4821, 0.4465]), atol=1e-3, rtol=0)
    torch.testing.assert_close(data.std, torch.tensor([0.2452, 0.2428, 0.2606]), atol=1e-2, rtol=0)
