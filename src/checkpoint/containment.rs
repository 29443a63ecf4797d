//! Which files a checkpoint may name: one plain component, resolved inside its folder or inside the hub cache entry the folder belongs to.
use super::CheckpointError;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// A folder of a checkpoint, and the folder that its links may lead into.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    root: PathBuf,
}

impl Folder {
    pub(crate) fn open(path: &Path) -> Result<Folder, CheckpointError> {
        let failed = |source| CheckpointError::Io { path: path.to_owned(), source };
        let resolved = path.canonicalize().map_err(failed)?;
        if !resolved.metadata().map_err(failed)?.is_dir() {
            return Err(CheckpointError::NotAFolder { path: path.to_owned() });
        }
        let root = cache_entry(&resolved).unwrap_or(&resolved).to_owned();
        Ok(Folder { path: path.to_owned(), root })
    }

    /// The folder `name` in this one; `None` where there is none. It may be a link as far as it stays inside.
    pub(crate) fn part(&self, name: &str) -> Result<Option<Folder>, CheckpointError> {
        let path = self.path.join(name);
        let failed = |source| CheckpointError::Io { path: path.clone(), source };
        let target = match path.canonicalize() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed)?,
        };
        if !target.starts_with(&self.root) {
            return Err(CheckpointError::Outside { path, target, root: self.root.clone() });
        }
        if !target.metadata().map_err(failed)?.is_dir() {
            return Err(CheckpointError::NotAFolder { path });
        }
        Ok(Some(Folder { path, root: self.root.clone() }))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens `name` in this folder, with links followed as far as they stay inside; `None` where there is no such file.
    pub(crate) fn file(&self, name: &str) -> Result<Option<File>, CheckpointError> {
        let path = self.path.join(name);
        if let Some(reason) = not_plain(name) {
            return Err(CheckpointError::UnsafeName {
                folder: self.path.clone(),
                name: super::header::shown(name),
                reason,
            });
        }
        let failed = |source| CheckpointError::Io { path: path.clone(), source };
        match path.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
            Ok(_) => {}
        }
        let target = match path.canonicalize() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(CheckpointError::DanglingLink { target: path.read_link().unwrap_or_default(), path });
            }
            other => other.map_err(failed)?,
        };
        if !target.starts_with(&self.root) {
            return Err(CheckpointError::Outside { path, target, root: self.root.clone() });
        }
        // Asked before opening, because opening a pipe would wait for its writer.
        if !target.metadata().map_err(failed)?.is_file() {
            return Err(CheckpointError::NotAFile { path });
        }
        File::open(&target).map(Some).map_err(failed)
    }

    /// Names of the files here that end as asked, sorted; names that are not UTF-8 are passed over.
    pub(crate) fn names(&self, ending: impl Fn(&str) -> bool) -> Result<Vec<String>, CheckpointError> {
        let failed = |source| CheckpointError::Io { path: self.path.clone(), source };
        let mut names = Vec::new();
        for entry in self.path.read_dir().map_err(failed)? {
            if let Ok(name) = entry.map_err(failed)?.file_name().into_string()
                && ending(&name)
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }
}

/// The `models--ORG--NAME` folder around `models--ORG--NAME/snapshots/REVISION[/..]`, whose files are links to `../../blobs/HASH`.
fn cache_entry(folder: &Path) -> Option<&Path> {
    let mut below: Option<&OsStr> = None;
    for ancestor in folder.ancestors() {
        let name = ancestor.file_name()?;
        if below == Some(OsStr::new("snapshots")) && name.to_str().is_some_and(|name| name.starts_with("models--")) {
            return Some(ancestor);
        }
        below = Some(name);
    }
    None
}

/// Why a name from a file is not one plain path component.
pub(crate) fn not_plain(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("which is empty")
    } else if name.len() > 255 {
        Some("which is longer than 255 bytes")
    } else if name.contains(['/', '\\']) || name == "." || name == ".." {
        Some("which is not a plain file name")
    } else if name.contains(char::is_control) {
        Some("which holds control characters")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_plain_names_pass() {
        for name in ["", ".", "..", "/etc/passwd", "a/b", "../a", "a\\b", "a\0b", "a\n", &"x".repeat(256)] {
            assert!(not_plain(name).is_some(), "{name:?}");
        }
        for name in ["model.safetensors", "..a", "a..b", "-x", "größe", "a b"] {
            assert_eq!(not_plain(name), None, "{name:?}");
        }
    }

    #[test]
    fn links_may_stay_inside_the_cache_entry_only() {
        let temporary = tempfile::tempdir().unwrap();
        let entry = temporary.path().join("models--o--n");
        let snapshot = entry.join("snapshots/abc");
        let folder = snapshot.join("llm");
        fs::create_dir_all(&folder).unwrap();
        fs::create_dir_all(entry.join("blobs")).unwrap();
        fs::write(entry.join("blobs/1"), "1").unwrap();
        fs::write(temporary.path().join("secret"), "2").unwrap();
        symlink("../../../blobs/1", folder.join("good")).unwrap();
        symlink("../../../../secret", folder.join("bad")).unwrap();
        symlink("nowhere", folder.join("dangling")).unwrap();
        symlink("loop", folder.join("loop")).unwrap();
        let folder = Folder::open(&folder).unwrap();
        assert!(folder.file("good").unwrap().is_some());
        assert!(folder.file("absent").unwrap().is_none());
        assert!(matches!(folder.file("bad"), Err(CheckpointError::Outside { .. })));
        assert!(matches!(folder.file("dangling"), Err(CheckpointError::DanglingLink { .. })));
        assert!(matches!(folder.file("loop"), Err(CheckpointError::Io { .. })));
        assert!(matches!(folder.file("../good"), Err(CheckpointError::UnsafeName { .. })));
        // The same tree under another name is an ordinary folder: its links may not leave it.
        fs::rename(&entry, temporary.path().join("copy")).unwrap();
        let folder = Folder::open(&temporary.path().join("copy/snapshots/abc/llm")).unwrap();
        assert!(matches!(folder.file("good"), Err(CheckpointError::Outside { .. })));
    }
}
