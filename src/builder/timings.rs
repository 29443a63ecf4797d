//! What TensorRT measured in earlier builds, in the user's cache folder: one file for each version and kind of GPU. A file
//! that is lost, damaged or of another version costs time, nothing else.
use crate::device::Gpu;
use std::io::Write;
use std::path::{Path, PathBuf};

pub(super) struct Timings {
    path: Option<PathBuf>,
}

impl Timings {
    pub(super) fn new(folder: Option<&Path>, library: &str, gpu: &Gpu) -> Timings {
        let name = format!("{library}-sm{}-{}.timings", gpu.capability, gpu.name);
        let plain = |letter: char| if letter.is_ascii_alphanumeric() || ".-".contains(letter) { letter } else { '_' };
        Timings { path: folder.map(|folder| folder.join(name.chars().map(plain).collect::<String>())) }
    }

    pub(super) fn read(&self) -> Option<Vec<u8>> {
        std::fs::read(self.path.as_ref()?).ok()
    }

    /// In one step, so that a build at the same time reads the old file or the new one.
    pub(super) fn write(&self, measured: &[u8]) {
        let Some((path, folder)) = self.path.as_ref().and_then(|path| Some((path, path.parent()?))) else { return };
        let write = || -> std::io::Result<()> {
            std::fs::create_dir_all(folder)?;
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            file.write_all(measured)?;
            file.persist(path)?;
            Ok(())
        };
        // Nothing depends on it.
        let _ = write();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_and_gpu_has_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let gpu = |name: &str| Gpu { name: name.into(), capability: 90 };
        let of = |library: &str, name: &str| Timings::new(Some(folder.path()), library, &gpu(name));
        let one = of("TensorRT 10.6.0.26", "NVIDIA H100 80GB/HBM3");
        assert_eq!(one.read(), None);
        one.write(b"measured");
        assert_eq!(one.read().as_deref(), Some(&b"measured"[..]));
        assert_eq!(of("TensorRT 10.7.0.23", "NVIDIA H100 80GB/HBM3").read(), None);
        assert_eq!(of("TensorRT 10.6.0.26", "NVIDIA H200").read(), None);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        Timings::new(None, "TensorRT 10.6.0.26", &gpu("x")).write(b"nowhere");
    }
}
