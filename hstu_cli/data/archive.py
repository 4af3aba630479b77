"""Takes the expected files out of a .tar.gz, and nothing else."""

import gzip
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from hstu_cli.errors import InputError, RunError


def extract(archive: Path, names: Iterable[str], folder: Path, *, max_bytes: int) -> dict[str, Path]:
    """Extract the members with these base names into `folder`; return the path of each.

    Every member is looked at: one that points outside the folder (an absolute path or `..`), a link
    or a device is refused, and so is an archive that unpacks to more than `max_bytes`. Other regular
    files are passed over. Raises InputError for all of these, and for a damaged or incomplete archive.
    """
    wanted = set(names)
    found: dict[str, Path] = {}
    unpacked = 0
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                _check_member(archive, member)
                unpacked += member.size
                if unpacked > max_bytes:
                    raise InputError(
                        f"{archive} unpacks to more than {max_bytes / 1e9:.0f} GB at member {member.name!r} "
                        f"({member.size / 1e9:.1f} GB). That is no KuaiRand archive; nothing was changed."
                    )
                name = PurePosixPath(member.name).name
                if not member.isfile() or name not in wanted:
                    continue
                if name in found:
                    raise InputError(f"{archive} holds {name} twice.")
                member.name = name
                tar.extract(member, folder, filter="data")
                found[name] = folder / name
            _read_to_the_end(archive, stream, max_bytes)
    except gzip.BadGzipFile as error:
        raise InputError(f"{archive} is no .tar.gz file, or damaged: {error}.") from error
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise InputError(f"{archive} is damaged or incomplete: {error}. Fetch it again.") from error
    except OSError as error:
        raise RunError(
            f"{archive} could not be extracted to {folder}: {error.strerror}. Nothing was changed."
        ) from error
    missing = sorted(wanted - set(found))
    if missing:
        raise InputError(f"{archive} lacks {', '.join(missing)}.")
    return found


def _read_to_the_end(archive: Path, stream: gzip.GzipFile, max_bytes: int) -> None:
    """Read what follows the last member, so that the stream's own checksum is compared."""
    while stream.read(1 << 20):
        if stream.tell() > max_bytes:
            raise InputError(f"{archive} unpacks to more than {max_bytes / 1e9:.0f} GB; nothing was changed.")


def _check_member(archive: Path, member: tarfile.TarInfo) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{archive} holds {member.name!r}, a path outside the archive. Refused; nothing was changed.")
    if not (member.isfile() or member.isdir()):
        kind = "link" if member.issym() or member.islnk() else "special file"
        raise InputError(f"{archive} holds the {kind} {member.name!r}. Refused; nothing was changed.")
