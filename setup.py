"""Builds the compiled extensions; what else there is to say about the package is in pyproject.toml.

The CPU sources are compiled once per instruction set, each time into a module of its own: an inline function
that was compiled for AVX-512 must never be linked into code that runs on a machine without it.  At run time
``milkernels/native.py`` imports one of them.

MILKERNELS_CPU          For which instruction sets. native: the one that this machine runs best, by PyTorch's own
                        judgement; all; or names with commas between them: avx512, avx2, default. Unset: native where
                        the modules stay beside the sources (in place, editable), all where they may be carried away.
MILKERNELS_BUILD_EXT    1: build the CPU modules or fail; 0: do not; unset: build if there is a compiler, and
                        where that fails warn and go on, as every op has a reference in PyTorch. asan, tsan: so that
                        AddressSanitizer and UBSan, or ThreadSanitizer, watch them: into a folder of build/ alone.
MILKERNELS_BUILD_CUDA   The same for the CUDA module: what counts is the toolkit, never a visible GPU.
MILKERNELS_BUILD_EMULATED   1: the CUDA kernels compiled for the host too, for tests where there is no GPU, by
                        csrc/cuda/emulator.h; asan: so that AddressSanitizer watches them; 0 or unset: not.
MAX_JOBS                How many compilers run at a time; unset: ninja decides.

A module's name has the minor version of PyTorch that it was compiled against, and no other loads it: the C++ interface
holds from one patch release to the next, not between minor ones.  A wheel's version names it ("+torch2.13"); one that
has no modules because there is no compiler, or no PyTorch to compile against, has "+reference".
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
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
TYPED_SOURCES = sorted(glob("csrc/cpu/typed/*.cpp"))  # they are compiled once for each of
TYPES = ("double", "float", "Half", "BFloat16")
LONGEST = (
    "instance_max",
    "pooling",
    "dsmil",
    "plain_pooling",
    "instances",
    "attention",
    "scores",
)  # to compile: they are started first
EMULATED_SOURCES = sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp") + glob("csrc/autograd.cpp"))
CUDA_SOURCES = [path for path in EMULATED_SOURCES if os.path.basename(path) != "emulator.cpp"]
# What the module is compiled for where TORCH_CUDA_ARCH_LIST says nothing, as far as the compiler knows them: 9.0a is
# Hopper with its matrix units, which PTX for later ones does without.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")
INSTRUCTION_SETS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
OPTIMISE = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]  # never -ffast-math
QUIET = ["-Wno-unknown-pragmas", "-Wno-psabi"]  # PyTorch's headers have hundreds; GCC notes vectors passed by value
CUDA_STANDARD = "-std=c++20"  # PyTorch's own was 17
# PyTorch switches the conversions and the arithmetic of half types off; the kernels use the former.
NVCC = ["-O3", "-lineinfo", "--expt-relaxed-constexpr", "-U__CUDA_NO_HALF_CONVERSIONS__"]
NVCC += ["-U__CUDA_NO_BFLOAT16_CONVERSIONS__", "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF2_OPERATORS__"]
DEBUG = ["-O1", "-g", "-fno-omit-frame-pointer", "-fvisibility=hidden"]
EMULATE = [*DEBUG, "-DMILKERNELS_EMULATED"]
SANITIZE = ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment"]
SANITIZERS = {
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"],
    "tsan": ["-fsanitize=thread"],
}


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
    built_for = "_".join(torch.__version__.split(".")[:2])
    return {
        "name": f"{NAMESPACE}.{name}_torch{built_for}",
        "sources": sources,
        "include_dirs": [os.path.abspath("csrc")],
        "depends": [*HEADERS, "setup.py"],
        "optional": not required,
    }


def lacking():
    """What a build needs and does not find, or None."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if torch is None:
        return "PyTorch"
    if shutil.which(compiler) is None:
        return f"a C++ compiler ({compiler})"
    return None if ninja_path() else "ninja"


def sanitizer():
    """That which is to watch the CPU modules, or "" for none."""
    value = os.environ.get("MILKERNELS_BUILD_EXT", "")
    return value if value in SANITIZERS else ""


def cpu_extensions():
    required = True if sanitizer() else setting("MILKERNELS_BUILD_EXT")
    if required is False or not CPU_SOURCES:
        return []
    if missing := lacking():
        refuse_or_warn(required, f"the compiled extension needs {missing}, and there is none.")
        return []
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    # All for one type at once: reading PyTorch's headers takes as long as compiling one of them.
    types = TYPES if TYPED_SOURCES else ()
    watch = SANITIZERS.get(sanitizer(), [])
    optimise = [*DEBUG, *watch] if watch else OPTIMISE
    typed = [wrapper(TYPED_SOURCES, f"cpu/typed_{name}", f"#define MILKERNELS_TYPE {name}") for name in types]
    return [
        cpp_extension.CppExtension(
            **common(f"_C_{name}", CPU_SOURCES + typed, required),
            define_macros=[("CPU_CAPABILITY", name.upper()), (f"CPU_CAPABILITY_{name.upper()}", None)],
            extra_compile_args=["-include", "cpu/intrinsics.h", *optimise, *QUIET, *openmp, *INSTRUCTION_SETS[name]],
            extra_link_args=[*openmp, *watch],
        )
        for name in instruction_sets("all")
    ]


def instruction_sets(wanted):
    """Those that are meant by a value of MILKERNELS_CPU."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    known = list(INSTRUCTION_SETS) if x86 else ["default"]
    if wanted == "all":
        return known
    if wanted == "native":
        best = torch.backends.cpu.get_cpu_capability().lower()
        return [best if best in known else "default"]
    names = wanted.split(",")
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"MILKERNELS_CPU must be native, all or of {','.join(known)}; got {','.join(unknown)!r}")
    return names


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
    # A C++ file around each: to the build a .cu is CUDA's whoever asks for it. It names the variant, so that another
    # one is compiled anew.
    sources = [wrapper([path], f"cuda/{Path(path).stem}", f"// {value}") for path in EMULATED_SOURCES]
    extension = cpp_extension.CppExtension(
        **common("_C_emulated", sources, True),
        extra_compile_args=[CUDA_STANDARD, *EMULATE, *QUIET, *sanitize],
        extra_link_args=sanitize,
    )
    extension.depends += EMULATED_SOURCES
    return [extension]


def wrapper(paths, name, line):
    """A C++ file of this name which has this line, and the sources behind it."""
    source = Path("build", "sources", f"{name}.cpp")
    text = "\n".join([line, *(f'#include "{os.path.abspath(path)}"' for path in paths)]) + "\n"
    if not source.exists() or source.read_text() != text:
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(text)
    return str(source)


class Graph:
    """The commands of all modules as one ninja file, so that all processors are busy until the last one is done."""

    def __init__(self, folder):
        self.file, self.edges = Path(folder, "build.ninja"), {}

    def add(self, command, **_):
        """In the place of running it. A build calls nothing but compilers and linkers."""
        output = command[command.index("-o") + 1]
        compiles = "-c" in command
        inputs = [command[command.index("-o") - 1]] if compiles else [part for part in command if part in self.edges]
        self.edges[output] = "compile" if compiles else "link", inputs, command

    def write(self):
        def rank(output):
            return next((i for i, name in enumerate(LONGEST) if Path(output).stem.startswith(name)), len(LONGEST))

        def escaped(text, special="$"):
            return "".join("$" + letter if letter in special else letter for letter in text)

        lines = [
            f"builddir = {escaped(str(self.file.parent))}",
            *("rule compile", "  command = $run -MMD -MF $out.d", "  depfile = $out.d", "  deps = gcc"),
            *("  description = compile $name", "rule link", "  command = $run", "  description = link $name"),
        ]
        for output in sorted(self.edges, key=rank):
            rule, inputs, command = self.edges[output]
            inputs = " ".join(escaped(os.path.abspath(path), "$ :") for path in inputs)
            lines += [
                f"build {escaped(output, '$ :')}: {rule} {inputs}",
                f"  run = {escaped(shlex.join(command))}",
                f"  name = {escaped(os.path.relpath(output, self.file.parent))}",
            ]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("\n".join(lines) + "\n")

    def run(self, targets, verbose):
        """Makes what it can of them."""
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS", "").isdigit() else []
        # What it prints goes to the process's standard error: Python's may be closed or another one.
        subprocess.run([*self.ninja("-k", "0", *jobs), *(["-v"] if verbose else []), *targets], stdout=2)

    def is_made(self, target):
        """Whether it is there, and from the sources as they are."""
        dry = subprocess.run(self.ninja("-n", target), capture_output=True, text=True)
        return "no work to do" in dry.stdout

    def ninja(self, *arguments):
        return [ninja_path(), "-f", str(self.file), *arguments]


def ninja_path():
    folders = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    return shutil.which("ninja", path=folders)


def build_command():
    class Build(cpp_extension.BuildExtension.with_options(use_ninja=False)):
        """Collects the commands of setuptools and PyTorch, and has ninja run them."""

        def finalize_options(self):
            super().finalize_options()
            # Not the temporary folder of an editable install: there, every build would start from nothing.
            version = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
            self.objects = os.path.abspath(os.path.join("build", f"{sanitizer() or 'objects'}-{version}"))
            self.force = True  # what is out of date is for ninja to say
            self.stays = bool(self.inplace)  # which setuptools hides while it builds
            self.sets = instruction_sets(os.environ.get("MILKERNELS_CPU") or ("native" if self.stays else "all"))

        def build_extensions(self):
            graph, build_lib = Graph(self.objects), self.build_lib
            # Modules are linked elsewhere: what an earlier build left where wheels are packed is removed below.
            self.compiler.call = self.compiler.spawn = graph.add  # its name since and before setuptools 84
            self.build_lib = self.objects
            super().build_extensions()
            graph.write()
            made = {extension.name: self.get_ext_fullpath(extension.name) for extension in self.extensions}
            self.build_lib = build_lib
            for old in Path(build_lib, NAMESPACE).glob("_C_*"):
                old.unlink()
            graph.run([made[e.name] for e in self.extensions if self.is_wanted(e)], self.distribution.verbose > 1)
            self.extensions = [e for e in self.extensions if self.is_built(graph, e, made[e.name])]
            if sanitizer():  # they stay where they were linked
                self.extensions = []
            for extension in self.extensions:
                target = Path(self.get_ext_fullpath(extension.name))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(made[extension.name], target)

        def build_extension(self, extension):
            self.build_temp = os.path.join(self.objects, extension.name.rpartition(".")[2])  # objects share names
            super().build_extension(extension)

        def is_wanted(self, extension):
            name = extension.name.partition("_C_")[2].partition("_")[0]
            return name not in INSTRUCTION_SETS or name in self.sets

        def is_built(self, graph, extension, path):
            """A module that stays may be one that was not asked for: as long as it is what the sources say."""
            stays = Path(self.get_ext_filename(extension.name))
            wanted = self.is_wanted(extension)
            if (wanted or self.stays and stays.exists()) and graph.is_made(path):
                return True
            if self.stays and not sanitizer():
                stays.unlink(missing_ok=True)
            if wanted:
                refuse_or_warn(not extension.optional, f"{extension.name} could not be compiled; the reason is above.")
            return False

    return Build


def local_version():
    """What a version says of the kernels: "+torch2.13", those for this PyTorch; "+reference", none as none could be
    compiled; nothing where they were not to be.

    Nor for a source distribution: who unpacks one may have another PyTorch, and pip refuses what has another version
    than its file said.
    """
    if "sdist" in sys.argv or os.path.exists("PKG-INFO"):
        return ""
    if extensions:
        return "+torch" + ".".join(torch.__version__.split(".")[:2])
    return "+reference" if setting("MILKERNELS_BUILD_EXT") is None and lacking() else ""


extensions = cpu_extensions() + cuda_extensions() + emulated_extensions()
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": build_command()} if extensions else {},
    options={"egg_info": {"tag_build": local_version()}},
)
