//! A directory under construction: the sibling `.NAME.building`, locked while a build works in it.
use super::{DirectoryError, FileEntry, Manifest, digest, manifest};
use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Removed again unless [`Staging::publish`] is reached.
#[derive(Debug)]
pub struct Staging {
    path: PathBuf,
    target: PathBuf,
    known: BTreeMap<String, FileEntry>,
    /// Holds the lock: an advisory lock on the directory itself, so that a dead build leaves none behind.
    _lock: File,
    published: bool,
}

impl Staging {
    /// Starts a build of `target`. What a killed build left behind is swept away; a living one is waited for, after
    /// `waiting` was called once.
    ///
    /// # Errors
    /// A target that exists and is not an engine directory (nor an empty folder), or a parent that cannot be written.
    pub fn start(target: &Path, waiting: impl FnOnce(&Path)) -> Result<Staging, DirectoryError> {
        let foreign = || DirectoryError::Foreign { path: target.into() };
        let name = target.file_name().ok_or_else(foreign)?.to_owned();
        if target.exists() && !replaceable(target)? {
            return Err(foreign());
        }
        let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(DirectoryError::io("create", parent))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(&name);
        hidden.push(".building");
        let path = parent.join(hidden);
        let lock = lock(&path, waiting)?;
        let old = path.with_extension("replaced");
        if !target.exists() && old.exists() {
            // A build was killed between its two renames: the directory before it is still whole.
            fs::rename(&old, target).map_err(DirectoryError::io("restore", target))?;
        }
        for entry in fs::read_dir(&path).map_err(DirectoryError::io("list", &path))?.flatten() {
            remove(&entry.path())?;
        }
        Ok(Staging { path, target: target.into(), known: BTreeMap::new(), _lock: lock, published: false })
    }

    /// Where a file of the directory is to be written; folders on the way are made.
    ///
    /// # Errors
    /// A folder that cannot be made.
    pub fn place(&self, name: &str) -> Result<PathBuf, DirectoryError> {
        let path = self.path.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(DirectoryError::io("create", parent))?;
        }
        Ok(path)
    }

    /// An empty folder inside.
    ///
    /// # Errors
    /// A folder that cannot be made.
    pub fn folder(&self, name: &str) -> Result<PathBuf, DirectoryError> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).map_err(DirectoryError::io("create", &path))?;
        Ok(path)
    }

    /// Removes a file or folder inside, if it is there.
    ///
    /// # Errors
    /// What cannot be removed.
    pub fn discard(&self, name: &str) -> Result<(), DirectoryError> {
        remove(&self.path.join(name))
    }

    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), DirectoryError> {
        let path = self.place(name)?;
        fs::write(&path, bytes).map_err(DirectoryError::io("write", &path))
    }

    /// The digest of a file that was hashed while it was written.
    pub fn written(&mut self, name: &str, entry: FileEntry) {
        self.known.insert(name.into(), entry);
    }

    /// Writes the manifest, makes everything durable and moves the directory to its place.
    ///
    /// # Errors
    /// Whatever the file system refuses; the target is then as it was.
    pub fn publish(mut self, mut manifest: Manifest) -> Result<Manifest, DirectoryError> {
        let mut files = Vec::new();
        list(&self.path, &self.path, &mut files)?;
        for name in files {
            let path = self.path.join(&name);
            let entry = match self.known.remove(&name) {
                Some(entry) => entry,
                None => digest(&path)?,
            };
            sync(&path)?;
            manifest.files.insert(name, entry);
        }
        let text = serde_json::to_string_pretty(&manifest)
            .map_err(|error| DirectoryError::Unreadable { path: self.path.clone(), reason: error.to_string() })?;
        self.write(manifest::NAME, format!("{text}\n").as_bytes())?;
        sync(&self.path.join(manifest::NAME))?;
        self.replace()?;
        Ok(manifest)
    }

    /// Makes everything durable and moves the directory to its place, without a manifest: for what is no engine directory.
    ///
    /// # Errors
    /// As [`Staging::publish`].
    pub fn publish_files(self) -> Result<(), DirectoryError> {
        let mut files = Vec::new();
        list(&self.path, &self.path, &mut files)?;
        files.iter().try_for_each(|name| sync(&self.path.join(name)))?;
        self.replace()
    }

    /// Moves the directory to its place.
    fn replace(mut self) -> Result<(), DirectoryError> {
        sync(&self.path)?;
        let old = self.path.with_extension("replaced");
        let replaces = self.target.exists();
        if replaces {
            remove(&old)?;
            fs::rename(&self.target, &old).map_err(DirectoryError::io("replace", &self.target))?;
        }
        if let Err(error) = fs::rename(&self.path, &self.target) {
            if replaces {
                let _ = fs::rename(&old, &self.target);
            }
            return Err(DirectoryError::io("write", &self.target)(error));
        }
        self.published = true;
        if let Some(parent) = self.target.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            sync(parent)?;
        }
        remove(&old)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// An engine directory or an empty folder may be replaced, nothing else.
fn replaceable(target: &Path) -> Result<bool, DirectoryError> {
    if !target.is_dir() {
        return Ok(false);
    }
    let empty = fs::read_dir(target).map_err(DirectoryError::io("list", target))?.next().is_none();
    Ok(empty || target.join(manifest::NAME).is_file())
}

fn lock(path: &Path, waiting: impl FnOnce(&Path)) -> Result<File, DirectoryError> {
    let mut waiting = Some(waiting);
    loop {
        match fs::create_dir(path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(DirectoryError::io("create", path)(error));
            }
            _ => {}
        }
        let file = match File::open(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            opened => opened.map_err(DirectoryError::io("open", path))?,
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                if let Some(waiting) = waiting.take() {
                    waiting(path);
                }
                file.lock().map_err(DirectoryError::io("lock", path))?;
            }
            Err(TryLockError::Error(error)) => return Err(DirectoryError::io("lock", path)(error)),
        }
        // The build that was waited for has renamed or removed this very directory: then start over with a new one.
        let same = |a: fs::Metadata, b: fs::Metadata| a.ino() == b.ino() && a.dev() == b.dev();
        if let (Ok(held), Ok(current)) = (file.metadata(), fs::metadata(path))
            && same(held, current)
        {
            return Ok(file);
        }
    }
}

fn remove(path: &Path) -> Result<(), DirectoryError> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(DirectoryError::io("remove", path)(error)),
        _ => Ok(()),
    }
}

fn sync(path: &Path) -> Result<(), DirectoryError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(DirectoryError::io("sync", path))
}

/// Every file below `folder`, relative to `root`, with `/` between the parts.
fn list(root: &Path, folder: &Path, files: &mut Vec<String>) -> Result<(), DirectoryError> {
    for entry in fs::read_dir(folder).map_err(DirectoryError::io("list", folder))? {
        let path = entry.map_err(DirectoryError::io("list", folder))?.path();
        if path.is_dir() {
            list(root, &path, files)?;
            sync(&path)?;
        } else if let Ok(name) = path.strip_prefix(root) {
            files.push(name.to_string_lossy().into_owned());
        }
    }
    files.sort();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use graphs::DType;

    fn manifest() -> Manifest {
        Manifest {
            schema: manifest::SCHEMA,
            version: "0".into(),
            model: "m".into(),
            model_type: "llama".into(),
            dtype: DType::Float16,
            quantization: BTreeMap::new(),
            tp: 1,
            targets: BTreeMap::new(),
            networks: vec!["language".into()],
            files: BTreeMap::new(),
            command: String::new(),
            built_at: manifest::timestamp(),
        }
    }

    fn build(target: &Path, content: &[u8]) {
        let staging = Staging::start(target, |_| {}).unwrap();
        staging.write("language/config.json", content).unwrap();
        staging.publish(manifest()).unwrap();
    }

    fn siblings(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn publishes_replaces_and_leaves_nothing_behind() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("engines");
        build(&target, b"first");
        build(&target, b"second");
        let directory = crate::engine_dir::EngineDirectory::open(&target).unwrap();
        directory.check().unwrap();
        assert_eq!(fs::read(directory.file("language/config.json").unwrap()).unwrap(), b"second");
        fs::write(target.join("language/config.json"), b"sEcond").unwrap();
        assert!(matches!(directory.check(), Err(DirectoryError::Changed { .. })));
        drop(Staging::start(&target, |_| {}).unwrap());
        assert_eq!(siblings(root.path()), ["engines"]);
    }

    #[test]
    fn leaves_foreign_folders_alone() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("home");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("letter.txt"), b"dear").unwrap();
        let error = Staging::start(&target, |_| {}).unwrap_err();
        assert!(matches!(error, DirectoryError::Foreign { .. }));
        assert_eq!(siblings(root.path()), ["home"]);
    }

    #[test]
    fn survives_a_kill_at_any_point() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("engines");
        build(&target, b"first");
        // Killed while building: the lock is gone with the process, its files are not.
        fs::create_dir(root.path().join(".engines.building")).unwrap();
        fs::write(root.path().join(".engines.building/model.engine"), b"half").unwrap();
        // Killed between the renames of a replacement.
        fs::rename(&target, root.path().join(".engines.replaced")).unwrap();
        drop(Staging::start(&target, |_| {}).unwrap());
        assert_eq!(fs::read(target.join("language/config.json")).unwrap(), b"first");
        assert_eq!(siblings(root.path()), ["engines"]);
    }

    #[test]
    fn a_second_build_waits_for_the_first() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("engines");
        let first = Staging::start(&target, |_| {}).unwrap();
        first.write("a", b"1").unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let other = target.clone();
        let second = std::thread::spawn(move || {
            let staging = Staging::start(&other, |_| sender.send(()).unwrap()).unwrap();
            staging.write("b", b"2").unwrap();
            staging.publish(manifest()).unwrap();
        });
        receiver.recv().unwrap();
        first.publish(manifest()).unwrap();
        second.join().unwrap();
        assert_eq!(siblings(&target), ["b", "manifest.json"]);
    }
}
