"""What setup.cfg cannot say: one address for all links, and archives with the same bytes on every build."""

import gzip
import os
import re
import shutil
import tarfile
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.sdist import sdist

# The address of the repository. CITATION.cff repeats it; python -m tests.packaging.check_release compares them.
URL = "https://github.com/OWNER/cupy_msda"

ROOT = Path(__file__).parent
MODULES = "".join(path.read_text("utf-8") for path in (ROOT / "cupy_msda").glob("*.py"))
VERSION = re.search(r'^__version__ = "(.*)"', MODULES, re.MULTILINE)[1]
PAGES, FILES = f"{URL}/blob/v{VERSION}/", f"{URL}/raw/v{VERSION}/"


def long_description() -> str:
    """The README, whose relative links and pictures lead to the repository: PyPI shows the page without its files."""
    text = (ROOT / "README.md").read_text("utf-8")
    relative = r"(?!https?:|mailto:|#)"
    text = re.sub(rf"(!\[[^\]]*\]\(){relative}", lambda match: match[1] + FILES, text)
    return re.sub(rf"((?<!!)\[[^\]]*\]\(){relative}", lambda match: match[1] + PAGES, text)


def set_permissions(folder: str) -> None:
    """The same for every file: setuptools copies those that data files and LICENSE have in the checkout."""
    for path in Path(folder).rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


class Build(build):
    """Without what an earlier build has left: setuptools would pack a file that is gone from the sources."""

    def run(self):
        shutil.rmtree(Path(self.build_lib, "cupy_msda"), ignore_errors=True)
        super().run()
        set_permissions(self.build_lib)


class Wheel(bdist_wheel):
    """The metadata of the wheel with the same permissions as its files."""

    def egg2dist(self, egginfo_path, distinfo_path):
        super().egg2dist(egginfo_path, distinfo_path)
        set_permissions(distinfo_path)


class SourceDistribution(sdist):
    """The archive without the owners, times and permissions of this machine."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        if format != "gztar":
            raise ValueError(f"format must be gztar, the one that is reproducible, got {format}; omit --formats")
        time = int(os.environ["SOURCE_DATE_EPOCH"])

        def normalise(entry):
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = time
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            return entry

        path = Path(f"{base_name}.tar.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            path.open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=time) as compressed,
            tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            tar.add(base_dir, filter=normalise)
        return str(path)


# The time of every entry, and the permissions of what setuptools writes. A release sets the time of its commit;
# 1980-01-01 is the first that zip can hold.
os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")
os.umask(0o022)

setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    project_urls={
        "Source": URL,
        "Documentation": f"{PAGES}README.md",
        "Changelog": f"{PAGES}CHANGELOG.md",
        "Issues": f"{URL}/issues",
    },
    cmdclass={"build": Build, "bdist_wheel": Wheel, "sdist": SourceDistribution},
)
