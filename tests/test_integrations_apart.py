"""The integrations are apart: not imported by the library, and each says what to install."""

import subprocess
import sys

import pytest


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_importing_the_library_imports_none_of_them():
    code = "import sys, decay_pruning; print([m for m in sys.modules if m.startswith('decay_pruning.integrations')])"
    assert python(code).stdout.strip() == "[]"


@pytest.mark.parametrize(("name", "package", "said"), [
    ("huggingface", ["transformers"], "pip install transformers accelerate"),
    ("lightning", ["lightning", "pytorch_lightning"], "pip install lightning"),
    ("hub", ["huggingface_hub"], "pip install huggingface_hub"),
])  # fmt: skip
def test_what_is_missing_is_named(name, package, said):
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({package})); import decay_pruning.integrations.{name}"
    )
    done = python(code)
    assert done.returncode and said in done.stderr.splitlines()[-1]
