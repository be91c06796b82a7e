import subprocess
import sys

HEAVY = ("lm_eval", "datasets", "gguf", "bitsandbytes", "triton", "accelerate", "peft")


def test_our_kernels_package_does_not_pass_for_the_hugging_face_one():
    from transformers.utils import is_kernels_available

    assert not is_kernels_available()


def test_importing_the_packages_stays_light():
    code = f"import sys, harness, kernels, kernels.formats, methods; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
