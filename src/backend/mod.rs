//! TensorRT libraries: where they are looked for, and where the RTX one is put.
mod install;

pub use install::{Install, Installed, WHEELS, Wheel, install};

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use thiserror::Error;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// TensorRT-RTX: builds without a GPU.
    Rtx,
    /// TensorRT 10 and later: builds on the GPU it builds for.
    Tensorrt,
    /// NVRTC, which compiles the kernels of TensorRT 10's plugins.
    Nvrtc,
}

impl Kind {
    const ALL: [Kind; 3] = [Kind::Rtx, Kind::Tensorrt, Kind::Nvrtc];

    fn name(self) -> &'static str {
        match self {
            Kind::Rtx => "TensorRT-RTX",
            Kind::Tensorrt => "TensorRT",
            Kind::Nvrtc => "NVRTC",
        }
    }

    fn stem(self) -> &'static str {
        match self {
            Kind::Rtx => "libtensorrt_rtx.so",
            Kind::Tensorrt => "libnvinfer.so",
            Kind::Nvrtc => "libnvrtc.so",
        }
    }
}

#[derive(Debug, Error)]
pub enum BackendError {
    #[error("no {name} library was found; looked at {}", .places.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join(", "))]
    NotFound { name: &'static str, places: Vec<PathBuf> },
    #[error("TRTVLM_TENSORRT names `{path}`, which holds no {name} library", path = .path.display())]
    Named { name: &'static str, path: PathBuf },
    #[error("cannot {action} `{path}`", path = .path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("neither XDG_DATA_HOME nor HOME is set: there is no place to install to")]
    NoHome,
    #[error("no Python with pip was found (tried python3 and python)")]
    NoPython,
    #[error("pip could not get the wheel: {message}")]
    Pip { message: String },
    #[error("the wheel has SHA-256 {found}, wanted {wanted}")]
    Digest { found: String, wanted: &'static str },
    #[error("the wheel holds no {library}")]
    Empty { library: &'static str },
}

impl BackendError {
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            BackendError::NotFound { name: "TensorRT-RTX", .. } => {
                "`trtvlm backend install rtx` gets it; or build with --target reference".into()
            }
            BackendError::NotFound { name: "NVRTC", .. } => {
                "`trtvlm backend install nvrtc` gets it; it also comes with the CUDA toolkit".into()
            }
            BackendError::NotFound { .. } | BackendError::Named { .. } => {
                "set TRTVLM_TENSORRT to the library or its folder".into()
            }
            BackendError::NoHome => "set HOME".into(),
            BackendError::NoPython => "install Python 3 with pip, or give a wheel with --from".into(),
            BackendError::Pip { .. } => "check the network and pip's settings, or give a wheel with --from".into(),
            BackendError::Digest { .. } => "fetch the wheel again".into(),
            BackendError::Io { .. } | BackendError::Empty { .. } => return None,
        })
    }
}

/// The variables that decide where libraries are.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// TRTVLM_TENSORRT: a library or a folder, before all other places.
    pub named: Option<PathBuf>,
    /// The user's data folder.
    pub data: Option<PathBuf>,
    pub library_path: Vec<PathBuf>,
    pub system: Vec<PathBuf>,
    /// Python's folders of packages.
    pub packages: Vec<PathBuf>,
}

impl Environment {
    pub fn of_process() -> Environment {
        let variable = |name| std::env::var_os(name).filter(|value: &OsString| !value.is_empty());
        let home = variable("HOME").map(|home| Path::new(&home).join(".local/share"));
        let system = ["/usr/lib/x86_64-linux-gnu", "/usr/local/lib", "/usr/lib", "/usr/local/cuda/lib64"];
        Environment {
            named: variable("TRTVLM_TENSORRT").map(PathBuf::from),
            data: variable("XDG_DATA_HOME").map(PathBuf::from).or(home),
            library_path: variable("LD_LIBRARY_PATH")
                .map(|list| std::env::split_paths(&list).filter(|path| path.is_absolute()).collect())
                .unwrap_or_default(),
            system: system.map(PathBuf::from).to_vec(),
            packages: python_packages(),
        }
    }

    fn backends(&self) -> Option<PathBuf> {
        self.data.as_ref().map(|data| data.join("trtvlm/backends"))
    }

    /// Folders in the order in which they are looked at.
    fn places(&self) -> Vec<PathBuf> {
        let installed = self.backends().and_then(|folder| std::fs::read_dir(folder).ok());
        let mut installed: Vec<PathBuf> = installed.into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        // The newest version first.
        installed.sort();
        installed.reverse();
        if installed.is_empty() {
            installed.extend(self.backends());
        }
        let wheels = [
            "tensorrt_rtx_libs",
            "tensorrt_libs",
            "tensorrt_rtx",
            "tensorrt",
            "nvidia/cu13/lib",
            "nvidia/cuda_nvrtc/lib",
        ];
        let wheels = self.packages.iter().flat_map(|packages| wheels.map(|name| packages.join(name)));
        installed.into_iter().chain(self.library_path.iter().chain(&self.system).cloned()).chain(wheels).collect()
    }
}

fn python_packages() -> Vec<PathBuf> {
    let script = "import site,sys; print('\\n'.join(site.getsitepackages() + [site.getusersitepackages()]))";
    let output = Command::new("python3").args(["-c", script]).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().map(PathBuf::from).filter(|path| path.is_dir()).collect()
}

/// Libraries of a kind in a folder, or the file itself: `libnvinfer.so`, `libnvinfer.so.10`, `libnvinfer.so.10.6.0`.
fn libraries(place: &Path, kind: Kind) -> Vec<PathBuf> {
    let matches = |path: &Path| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let rest = name.strip_prefix(kind.stem());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.')) && path.is_file()
    };
    if matches(place) {
        return vec![place.to_path_buf()];
    }
    let entries = std::fs::read_dir(place).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<PathBuf> = entries.filter(|path| matches(path)).collect();
    found.sort();
    found
}

/// The first library of a kind.
///
/// # Errors
/// Where there is none, with the places looked at.
pub fn find(kind: Kind) -> Result<PathBuf, BackendError> {
    // Builders work in folders of their own.
    find_in(kind, &Environment::of_process()).map(|path| std::path::absolute(&path).unwrap_or(path))
}

fn find_in(kind: Kind, environment: &Environment) -> Result<PathBuf, BackendError> {
    let name = kind.name();
    if let Some(path) = &environment.named {
        // A folder of one kind does not keep the other kind from being found elsewhere.
        match libraries(path, kind).into_iter().next() {
            Some(found) => return Ok(found),
            None if Kind::ALL.iter().all(|&kind| libraries(path, kind).is_empty()) => {
                return Err(BackendError::Named { name, path: path.clone() });
            }
            None => {}
        }
    }
    let places = environment.places();
    let found = places.iter().find_map(|place| libraries(place, kind).into_iter().next());
    found.ok_or(BackendError::NotFound { name, places })
}

/// A library that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundLibrary {
    pub kind: Kind,
    pub path: PathBuf,
}

/// All libraries, one entry for each file however many names it has, in the order in which they would be taken.
pub fn list(environment: &Environment) -> Vec<FoundLibrary> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for place in environment.named.iter().cloned().chain(environment.places()) {
        for kind in Kind::ALL {
            for path in libraries(&place, kind) {
                if seen.insert(path.canonicalize().unwrap_or_else(|_| path.clone())) {
                    found.push(FoundLibrary { kind, path });
                }
            }
        }
    }
    found
}

/// Where TensorRT's measurements are kept from one build to the next.
pub fn timings_folder() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value: &OsString| !value.is_empty()).map(PathBuf::from);
    let cache = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")))?;
    Some(cache.join("trtvlm/timings"))
}

/// Whether a CUDA driver seems to be there: its device files, or its library in the usual places.
pub fn has_driver() -> bool {
    let places = ["/proc/driver/nvidia/version", "/usr/lib/x86_64-linux-gnu/libcuda.so.1", "/usr/lib64/libcuda.so.1"];
    places.iter().any(|place| Path::new(place).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, b"").unwrap();
    }

    #[test]
    fn places_are_looked_at_in_order() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        let mut environment = Environment {
            data: Some(at("data")),
            library_path: vec![at("libs")],
            packages: vec![at("packages")],
            ..Environment::default()
        };
        let error = find_in(Kind::Rtx, &environment).unwrap_err();
        assert!(error.to_string().contains("data/trtvlm/backends"), "{error}");
        touch(&at("packages/tensorrt_rtx_libs/libtensorrt_rtx.so.1"));
        touch(&at("packages/tensorrt_rtx_libs/libtensorrt_onnxparser_rtx.so.1"));
        let found = |environment: &Environment| find_in(Kind::Rtx, environment).unwrap();
        assert_eq!(found(&environment), at("packages/tensorrt_rtx_libs/libtensorrt_rtx.so.1"));
        touch(&at("libs/libtensorrt_rtx.so.1"));
        assert_eq!(found(&environment), at("libs/libtensorrt_rtx.so.1"));
        touch(&at("data/trtvlm/backends/tensorrt-rtx-1.7.1.116/libtensorrt_rtx.so.1"));
        assert_eq!(found(&environment), at("data/trtvlm/backends/tensorrt-rtx-1.7.1.116/libtensorrt_rtx.so.1"));
        assert_eq!(list(&environment).len(), 3);
        touch(&at("named/libtensorrt_rtx.so.1"));
        environment.named = Some(at("named"));
        assert_eq!(found(&environment), at("named/libtensorrt_rtx.so.1"));
        environment.named = Some(at("nowhere"));
        assert!(matches!(find_in(Kind::Rtx, &environment), Err(BackendError::Named { .. })));
        touch(&at("other/libnvinfer.so.10"));
        environment.named = Some(at("other"));
        assert_eq!(found(&environment), at("data/trtvlm/backends/tensorrt-rtx-1.7.1.116/libtensorrt_rtx.so.1"));
    }
}
