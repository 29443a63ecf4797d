//! Getting NVIDIA's libraries: the wheels on PyPI, fetched by pip, checked, unpacked.
use super::{BackendError, Environment};
use crate::engine_dir::digest;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// A library that NVIDIA puts on PyPI as a wheel.
#[derive(Debug)]
pub struct Wheel {
    /// What it is asked for by.
    pub name: &'static str,
    pub title: &'static str,
    package: &'static str,
    pub version: &'static str,
    pub sha256: &'static str,
    /// Bytes of the wheel, for the progress shown.
    bytes: u64,
    /// Where its libraries lie in the wheel; the first is the one that is used.
    folder: &'static str,
    libraries: &'static [&'static str],
}

pub const WHEELS: [Wheel; 2] = [
    Wheel {
        name: "rtx",
        title: "TensorRT-RTX",
        package: "tensorrt-rtx-cu13-libs",
        version: "1.7.1.116",
        sha256: "e3fd45fed001240d63304e77a2d4006319b839994237cb294b6e7ad72acaabcd",
        bytes: 95153708,
        folder: "tensorrt_rtx_libs",
        libraries: &["libtensorrt_rtx.so.1"],
    },
    Wheel {
        name: "nvrtc",
        title: "NVRTC",
        package: "nvidia-cuda-nvrtc-cu12",
        version: "12.8.93",
        sha256: "a7756528852ef889772a84c6cd89d41dfa74667e24cca16bb31f8f061e3e9994",
        bytes: 88040029,
        folder: "nvidia/cuda_nvrtc/lib",
        libraries: &["libnvrtc.so.12", "libnvrtc-builtins.so.12.8"],
    },
];

impl Wheel {
    /// Name of its folder among the installed ones.
    fn place(&self) -> String {
        format!("{}-{}", self.title.to_lowercase(), self.version)
    }
}

pub struct Install<'i> {
    pub wheel: &'static Wheel,
    pub environment: &'i Environment,
    /// Install even if it is there.
    pub force: bool,
    /// A wheel on this machine, instead of PyPI.
    pub from: Option<PathBuf>,
    /// Sees bytes fetched, of all.
    pub progress: &'i dyn Fn(u64, u64),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    pub path: PathBuf,
    /// It was there already and nothing was done.
    pub kept: bool,
}

/// Puts the library into the user's data folder.
///
/// # Errors
/// A wheel that cannot be had, is another one, or cannot be unpacked; nothing is left behind then.
pub fn install(options: &Install<'_>) -> Result<Installed, BackendError> {
    let backends = options.environment.backends().ok_or(BackendError::NoHome)?;
    let wanted = options.wheel;
    let folder = backends.join(wanted.place());
    let path = folder.join(wanted.libraries.first().copied().unwrap_or_default());
    if wanted.libraries.iter().all(|library| folder.join(library).is_file()) && !options.force {
        return Ok(Installed { path, kept: true });
    }
    let io = |action, path: &Path| {
        let path = path.to_path_buf();
        move |source| BackendError::Io { action, path, source }
    };
    std::fs::create_dir_all(&backends).map_err(io("create", &backends))?;
    // On the same file system as its place, and gone again if anything fails.
    let work = tempfile::Builder::new().prefix(".installing-").tempdir_in(&backends).map_err(io("write", &backends))?;
    // Unpacking takes Python alone, fetching its pip too.
    let python = python(if options.from.is_some() { "zipfile" } else { "pip" })?;
    let wheel = match &options.from {
        Some(wheel) => wheel.clone(),
        None => download(wanted, python, work.path(), options.progress)?,
    };
    std::fs::File::open(&wheel).map_err(io("read", &wheel))?;
    let found = digest(&wheel).map_err(|error| io("read", &wheel)(std::io::Error::other(error)))?.sha256;
    if found != wanted.sha256 {
        return Err(BackendError::Digest { found, wanted: wanted.sha256 });
    }
    let unpacked = work.path().join("unpacked");
    let output = Command::new(python).args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&unpacked).output();
    let output = output.map_err(io("unpack", &wheel))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(io("unpack", &wheel)(std::io::Error::other(message)));
    }
    let sync = |path: &Path| std::fs::File::open(path).and_then(|file| file.sync_all());
    std::fs::create_dir_all(&folder).map_err(io("create", &folder))?;
    for name in wanted.libraries {
        let library = unpacked.join(wanted.folder).join(name);
        if !library.is_file() {
            return Err(BackendError::Empty { library: name });
        }
        sync(&library).map_err(io("sync", &library))?;
        // Over the old one in one step, so that there is a whole library at every moment.
        std::fs::rename(&library, folder.join(name)).map_err(io("write", &folder))?;
    }
    sync(&folder).map_err(io("sync", &folder))?;
    Ok(Installed { path, kept: false })
}

/// A Python that has a module.
fn python(module: &str) -> Result<&'static str, BackendError> {
    let works = |name: &&str| {
        let mut check = Command::new(name);
        check.args(["-c", &format!("import {module}")]).stdout(Stdio::null()).stderr(Stdio::null());
        check.status().is_ok_and(|status| status.success())
    };
    ["python3", "python"].into_iter().find(works).ok_or(BackendError::NoPython)
}

fn download(wheel: &Wheel, python: &str, folder: &Path, progress: &dyn Fn(u64, u64)) -> Result<PathBuf, BackendError> {
    let fail = |message: String| BackendError::Pip { message };
    let requirement = format!("{}=={}", wheel.package, wheel.version);
    let log = folder.join("pip.log");
    let errors = std::fs::File::create(&log).map_err(|error| fail(error.to_string()))?;
    let mut child = Command::new(python)
        .args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"])
        .args(["--only-binary=:all:", "--dest"])
        .arg(folder)
        .arg(&requirement)
        // pip writes to its own temporary folder first; kept here, its size can be followed.
        .env("TMPDIR", folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // A file, since a pipe that nobody empties would hold pip up.
        .stderr(errors.try_clone().map_err(|error| fail(error.to_string()))?)
        .spawn()
        .map_err(|error| fail(error.to_string()))?;
    while child.try_wait().map_err(|error| fail(error.to_string()))?.is_none() {
        progress(size(folder).min(wheel.bytes), wheel.bytes);
        std::thread::sleep(Duration::from_millis(200));
    }
    if !child.wait().map_err(|error| fail(error.to_string()))?.success() {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let line = text.lines().rev().find(|line| line.contains("ERROR")).unwrap_or(&text);
        return Err(fail(line.trim().to_owned()));
    }
    let wheel = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"));
    wheel.ok_or_else(|| fail("it reported success and left no wheel".into()))
}

/// Bytes of all files below a folder.
fn size(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let of = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => size(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_wheel_is_refused_and_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let wheel = root.path().join("x.whl");
        std::fs::write(&wheel, b"no wheel").unwrap();
        let environment = Environment { data: Some(root.path().join("data")), ..Environment::default() };
        let options = Install {
            wheel: &WHEELS[0],
            environment: &environment,
            force: false,
            from: Some(wheel),
            progress: &|_, _| {},
        };
        assert!(matches!(install(&options), Err(BackendError::Digest { .. })));
        let left = std::fs::read_dir(root.path().join("data/trtvlm/backends")).unwrap().count();
        assert_eq!(left, 0);
    }
}
