//! The engine directory: written to a hidden sibling, hashed, synced and renamed, so that it is never half there.
pub mod config;
pub mod manifest;
mod staging;

pub use config::{EngineConfig, Multimodal, SizeError, SizeRequest, Sizes};
pub use manifest::{FileEntry, Manifest, TargetEntry};
pub use staging::Staging;

use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Files of the checkpoint that a run needs, copied to `processor/`.
pub const PROCESSOR: &str = "processor";

#[derive(Debug, Error)]
pub enum DirectoryError {
    #[error("cannot {action} `{path}`")]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("`{path}` exists and is not an engine directory")]
    Foreign { path: PathBuf },
    #[error("`{path}` is not an engine directory: it has no manifest.json")]
    NoManifest { path: PathBuf },
    #[error("`{path}`: {reason}")]
    Unreadable { path: PathBuf, reason: String },
    #[error("`{path}` was written by schema {found}, this version reads {}", manifest::SCHEMA)]
    Schema { path: PathBuf, found: u64 },
    #[error("`{path}` was changed: wanted {wanted}, found {found}")]
    Changed { path: PathBuf, wanted: String, found: String },
}

impl DirectoryError {
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            DirectoryError::Foreign { .. } => "choose another folder with -o, or remove this one".into(),
            DirectoryError::NoManifest { .. } => "`trtvlm build MODEL -o DIR` writes one".into(),
            DirectoryError::Schema { .. } | DirectoryError::Changed { .. } | DirectoryError::Unreadable { .. } => {
                "build the directory again".into()
            }
            DirectoryError::Io { .. } => return None,
        })
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> DirectoryError {
        let path = path.to_path_buf();
        move |source| DirectoryError::Io { action, path, source }
    }
}

/// A directory that a build finished.
#[derive(Clone)]
pub struct EngineDirectory {
    pub path: PathBuf,
    pub manifest: Manifest,
}

impl EngineDirectory {
    /// Reads the manifest; files are checked when they are used, or all at once by [`EngineDirectory::check`].
    ///
    /// # Errors
    /// A folder that is no engine directory or of another schema.
    pub fn open(path: &Path) -> Result<EngineDirectory, DirectoryError> {
        let file = path.join(manifest::NAME);
        if !file.exists() {
            return Err(DirectoryError::NoManifest { path: path.into() });
        }
        let value: serde_json::Value = read_json(&file)?;
        let schema = value.get("schema").and_then(serde_json::Value::as_u64).unwrap_or(0);
        if schema != u64::from(manifest::SCHEMA) {
            return Err(DirectoryError::Schema { path: file, found: schema });
        }
        let manifest = serde_json::from_value(value)
            .map_err(|error| DirectoryError::Unreadable { path: file, reason: error.to_string() })?;
        Ok(EngineDirectory { path: path.into(), manifest })
    }

    /// The path of a file that the manifest lists, after comparing its size and SHA-256.
    ///
    /// # Errors
    /// A file that is not listed, missing or changed.
    pub fn file(&self, name: &str) -> Result<PathBuf, DirectoryError> {
        let path = self.path.join(name);
        let entry = self.manifest.files.get(name).ok_or_else(|| DirectoryError::Unreadable {
            path: self.path.join(manifest::NAME),
            reason: format!("lists no file `{name}`"),
        })?;
        let found = digest(&path)?;
        if found != *entry {
            let text = |entry: &FileEntry| format!("{} bytes, SHA-256 {}", entry.bytes, entry.sha256);
            return Err(DirectoryError::Changed { path, wanted: text(entry), found: text(&found) });
        }
        Ok(path)
    }

    /// Compares every file with the manifest.
    ///
    /// # Errors
    /// The first file that is missing or changed.
    pub fn check(&self) -> Result<(), DirectoryError> {
        self.manifest.files.keys().try_for_each(|name| self.file(name).map(drop))
    }

    /// `config.json` of a sub-network.
    ///
    /// # Errors
    /// As [`EngineDirectory::file`], or a file that is not such a config.
    pub fn config(&self, network: &str) -> Result<EngineConfig, DirectoryError> {
        read_json(&self.file(&format!("{network}/config.json"))?)
    }

    /// The sub-network that gives the logits.
    pub fn language(&self) -> &'static str {
        if self.manifest.networks.iter().any(|name| name == "decoder") { "decoder" } else { "language" }
    }

    pub fn processor(&self) -> PathBuf {
        self.path.join(PROCESSOR)
    }
}

pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, DirectoryError> {
    let text = std::fs::read(path).map_err(DirectoryError::io("read", path))?;
    serde_json::from_slice(&text)
        .map_err(|error| DirectoryError::Unreadable { path: path.into(), reason: error.to_string() })
}

/// Size and SHA-256 of a file.
///
/// # Errors
/// A file that cannot be read.
pub fn digest(path: &Path) -> Result<FileEntry, DirectoryError> {
    let mut file = File::open(path).map_err(DirectoryError::io("open", path))?;
    let (mut hash, mut bytes, mut buffer) = (Sha256::new(), 0u64, vec![0; 1 << 20]);
    loop {
        let read = file.read(&mut buffer).map_err(DirectoryError::io("read", path))?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        bytes += read as u64;
    }
    Ok(FileEntry { bytes, sha256: hex(&hash.finalize()) })
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
