"""Builds the compiled extensions; what else there is to say about the package is in pyproject.toml.

The CPU sources are compiled once per instruction set, each time into a module of its own: an inline function
that was compiled for AVX-512 must never be linked into code that runs on a machine without it.  At run time
``milkernels/native.py`` imports one of them.

MILKERNELS_BUILD_EXT    1: build the CPU modules or fail; 0: do not; unset: build if there is a compiler, and
                        where that fails warn and go on, as every op has a reference in PyTorch.
MILKERNELS_BUILD_CUDA   The same for the CUDA module: what counts is the toolkit, never a visible GPU.
MILKERNELS_BUILD_EMULATED   1: the CUDA kernels compiled for the host too, for tests where there is no GPU, by
                        csrc/cuda/emulator.h; asan: so that AddressSanitizer watches them; 0 or unset: not.
"""

import os
import platform
import shutil
import subprocess
import sys
import traceback
from glob import glob
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None

NAMESPACE = "milkernels"
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))
CPU_SOURCES = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
EMULATED_SOURCES = sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp"))
CUDA_SOURCES = [path for path in EMULATED_SOURCES if os.path.basename(path) != "emulator.cpp"]
# What the module is compiled for where TORCH_CUDA_ARCH_LIST says nothing, as far as the compiler knows them: 9.0a is
# Hopper with its matrix units, which PTX for later ones does without.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")
INSTRUCTION_SETS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
    + ["-Wno-maybe-uninitialized"],  # GCC's own headers, up to 12
}
OPTIMISE = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]  # never -ffast-math
QUIET = ["-Wno-unknown-pragmas", "-Wno-psabi"]  # PyTorch's headers have hundreds; GCC notes vectors passed by value
CUDA_STANDARD = "-std=c++20"  # PyTorch's own was 17
# PyTorch switches the conversions and the arithmetic of half types off; the kernels use the former.
NVCC = ["-O3", "-lineinfo", "--expt-relaxed-constexpr", "-U__CUDA_NO_HALF_CONVERSIONS__"]
NVCC += ["-U__CUDA_NO_BFLOAT16_CONVERSIONS__", "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF2_OPERATORS__"]
EMULATE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fvisibility=hidden", "-DMILKERNELS_EMULATED"]
SANITIZE = ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment"]


def setting(name):
    """True: must be built, False: must not, None: if possible."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0, 1 or unset; got {value!r}")
    return None if value == "" else value == "1"


def refuse_or_warn(required, message):
    if required:
        raise SystemExit(f"milkernels: {message}")
    line = "!" * 100
    print(
        line,
        f"milkernels: {message}",
        "Going on without it, so ops will be slower.",
        line,
        sep="\n",
        file=sys.stderr,
    )


def common(name, sources, required):
    # An optional extension that was not built is no error to setuptools.
    return {
        "name": f"{NAMESPACE}.{name}",
        "sources": sources,
        "include_dirs": [os.path.abspath("csrc")],
        "depends": [*HEADERS, "setup.py"],
        "optional": not required,
    }


def cpu_extensions():
    required = setting("MILKERNELS_BUILD_EXT")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if required is False or not CPU_SOURCES:
        return []
    if torch is None or shutil.which(compiler) is None:
        missing = "PyTorch" if torch is None else f"a C++ compiler ({compiler})"
        refuse_or_warn(required, f"the compiled extension needs {missing}, and there is none.")
        return []
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [
        cpp_extension.CppExtension(
            **common(f"_C_{name}", CPU_SOURCES, required),
            define_macros=[("CPU_CAPABILITY", name.upper()), (f"CPU_CAPABILITY_{name.upper()}", None)],
            extra_compile_args=[*OPTIMISE, *QUIET, *openmp, *flags],
            extra_link_args=openmp,
        )
        for name, flags in INSTRUCTION_SETS.items()
        if x86 or name == "default"
    ]


def cuda_extensions():
    required = setting("MILKERNELS_BUILD_CUDA")
    if required is False or not CUDA_SOURCES:
        return []
    cuda = torch is not None and torch.version.cuda is not None
    if not cuda or cpp_extension.CUDA_HOME is None:
        if cuda or required:  # a PyTorch without CUDA needs no warning
            refuse_or_warn(required, "the CUDA module needs a PyTorch built for CUDA, and CUDA's compiler.")
        return []
    # Without a list PyTorch asks the visible GPU; the build must be the same on a machine that has none.
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(cpp_extension.CUDA_HOME)
    return [
        cpp_extension.CUDAExtension(
            **common("_C_cuda", CUDA_SOURCES, required),
            extra_compile_args={"cxx": [CUDA_STANDARD, *OPTIMISE, *QUIET], "nvcc": [CUDA_STANDARD, *NVCC]},
        )
    ]


def architectures(toolkit):
    """Those that this toolkit knows, and PTX for later ones."""
    command = [os.path.join(toolkit, "bin", "nvcc"), "--list-gpu-code"]
    try:
        known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        known = []  # the build says why
    chosen = [arch for arch in ARCHITECTURES if f"sm_{arch.rstrip('a').replace('.', '')}" in known] or ["8.0", "9.0a"]
    last = next(i for i in reversed(range(len(chosen))) if not chosen[i].endswith("a"))  # PTX of 9.0a is for 9.0 only
    chosen[last] += "+PTX"
    return ";".join(chosen)


def emulated_extensions():
    name = "MILKERNELS_BUILD_EMULATED"
    value = os.environ.get(name, "")
    if value not in ("", "0", "1", "asan"):
        raise SystemExit(f"{name} must be 0, 1, asan or unset; got {value!r}")
    if value in ("", "0"):
        return []
    if torch is None:
        raise SystemExit("milkernels: the emulated module needs PyTorch, and there is none.")
    sanitize = SANITIZE if value == "asan" else []
    extension = cpp_extension.CppExtension(
        **common("_C_emulated", [host_source(path, value) for path in EMULATED_SOURCES], required=True),
        extra_compile_args=[CUDA_STANDARD, *EMULATE, *QUIET, *sanitize],
        extra_link_args=sanitize,
    )
    extension.depends += EMULATED_SOURCES
    return [extension]


def host_source(path, variant):
    """A C++ file that includes this one: to the build a .cu is CUDA's whoever asks for it. It names the variant, so
    that another one is compiled anew."""
    source = Path("build", "emulated", Path(path).with_suffix(".cpp").name)
    text = f'// {variant}\n#include "{os.path.abspath(path)}"\n'
    if not source.exists() or source.read_text() != text:
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(text)
    return str(source)


def build_command():
    class Build(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # Not the temporary folder of an editable install: there, every build would start from nothing.
            version = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
            self.build_temp = os.path.abspath(os.path.join("build", f"objects-{version}"))

        def build_extensions(self):
            """One at a time: the objects share names, and what fails is told from what does not."""
            extensions, build_temp, built = self.extensions, self.build_temp, []
            for extension in extensions:
                self.extensions = [extension]
                self.build_temp = os.path.join(build_temp, extension.name.rpartition(".")[2])
                try:
                    super().build_extensions()
                    built.append(extension)
                except Exception:
                    if not extension.optional:
                        raise
                    traceback.print_exc()
                    refuse_or_warn(False, f"{extension.name} could not be compiled; the reason is above.")
            self.extensions, self.build_temp = built, build_temp

    return Build


extensions = cpu_extensions() + cuda_extensions() + emulated_extensions()
setup(ext_modules=extensions, cmdclass={"build_ext": build_command()} if extensions else {})
