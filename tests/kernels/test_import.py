import subprocess
import sys


def test_our_kernels_package_does_not_pass_for_the_hugging_face_one():
    from transformers.utils import is_kernels_available

    assert not is_kernels_available()


def test_importing_the_packages_stays_light():
    code = (
        "import sys, harness, kernels, methods; "
        "print([m for m in ('lm_eval', 'datasets', 'gguf', 'bitsandbytes', 'triton', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_arrows_go_one_way():
    code = "import sys, kernels.formats; print([m for m in sys.modules if m.split('.')[0] in ('methods', 'harness')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    every = "import sys, methods; [methods.method_class(name) for name in methods.REGISTRY]; "
    code = every + "print([m for m in sys.modules if m.split('.')[0] == 'harness'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
