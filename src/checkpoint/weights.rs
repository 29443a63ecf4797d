//! The weights of one folder: which files hold them, and where in them each tensor lies. Safetensors win over PyTorch files.
use super::containment::{Folder, not_plain};
use super::header::{self, Located, shown};
use super::trtllm::Joined;
use super::{BinFault, CheckpointError, json, nearest, read_json, torch_bin};
use graphs::DType;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, Metadata};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Names that weights have, safetensors first: the only file, the index of several, the only one under another name.
const LAYOUTS: [Layout; 2] = [
    Layout {
        single: "model.safetensors",
        index: "model.safetensors.index.json",
        is_other: |name| name.ends_with(".safetensors"),
        kind: "safetensors",
    },
    Layout { single: "pytorch_model.bin", index: "pytorch_model.bin.index.json", is_other: is_bin, kind: "`.bin`" },
];
/// LLaVA's training keeps the projector apart, in the folder of the model or of its own.
const PROJECTOR: &str = "mm_projector.bin";

struct Layout {
    single: &'static str,
    index: &'static str,
    is_other: fn(&str) -> bool,
    kind: &'static str,
}

/// Trainers leave other `.bin` files, whose contents are no weights.
pub(crate) fn is_bin(name: &str) -> bool {
    (name.starts_with("pytorch_model") && name.ends_with(".bin")) || name == PROJECTOR
}

/// Where one tensor lies. `shape` is row-major, `offset` and `bytes` are in bytes of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Which of [`Weights::files`].
    pub file: usize,
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// Of the first element, from the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

/// Open safetensors or PyTorch files of one folder and the tensors in them; only headers are in memory.
#[derive(Debug)]
pub struct Weights {
    folder: PathBuf,
    files: Vec<OpenFile>,
    tensors: BTreeMap<String, TensorEntry>,
    /// Those of sharded folders.
    indexes: Vec<Watched>,
    /// Tensors that lie in the files of several ranks.
    joined: Option<Box<Joined>>,
}

#[derive(Debug)]
struct OpenFile {
    file: File,
    watched: Watched,
}

/// Opens the weights of `folder`, which needs no config: a single file, or an index and its shards.
pub fn open_weights(folder: &Path) -> Result<Weights, CheckpointError> {
    Weights::open(&Folder::open(folder)?)
}

impl Weights {
    pub(crate) fn open(folder: &Folder) -> Result<Weights, CheckpointError> {
        for layout in &LAYOUTS {
            let mut weights = if let Some(file) = folder.file(layout.single)? {
                Self::single(folder, layout.single, file)?
            } else if let Some((index, watched)) = read_json(folder, layout.index)? {
                Self::sharded(folder, layout.index, &index, watched)?
            } else {
                let names = folder.names(layout.is_other)?;
                match names.as_slice() {
                    [] => continue,
                    [name] => match folder.file(name)? {
                        Some(file) => Self::single(folder, name, file)?,
                        None => continue,
                    },
                    _ => {
                        let (folder, kind, index) = (folder.path().to_owned(), layout.kind, layout.index);
                        return Err(CheckpointError::ManyWeights { folder, names, kind, index });
                    }
                }
            };
            weights.add_projector(folder)?;
            return Ok(weights);
        }
        Err(CheckpointError::NoWeights { folder: folder.path().to_owned() })
    }

    /// Adds what a projector's own file beside the weights has and they lack.
    fn add_projector(&mut self, folder: &Folder) -> Result<(), CheckpointError> {
        if !self.files.iter().all(|file| file.watched.path.extension().is_some_and(|ending| ending == "bin")) {
            return Ok(());
        }
        let path = folder.path().join(PROJECTOR);
        if let Some(file) = folder.file(PROJECTOR)?.filter(|_| self.files().all(|file| file != path)) {
            for (name, entry) in self.add(path, file)? {
                self.tensors.entry(name).or_insert(entry);
            }
        }
        Ok(())
    }

    fn single(folder: &Folder, name: &str, file: File) -> Result<Weights, CheckpointError> {
        let mut weights = Weights::empty(folder);
        for (name, located) in weights.add(folder.path().join(name), file)? {
            weights.tensors.insert(name, located);
        }
        Ok(weights)
    }

    fn sharded(folder: &Folder, name: &str, index: &Value, watched: Watched) -> Result<Weights, CheckpointError> {
        let index_path = folder.path().join(name);
        let places = weight_map(&index_path, index)?;
        let shards: BTreeSet<&str> = places.values().copied().collect();
        let mut weights = Weights::empty(folder);
        weights.indexes.push(watched);
        let (mut strangers, mut absent) = (Vec::new(), Vec::new());
        for shard in shards {
            let Some(file) = folder.file(shard)? else {
                absent.push(shard.to_owned());
                continue;
            };
            for (name, entry) in weights.add(folder.path().join(shard), file)? {
                match places.get(name.as_str()) {
                    Some(place) if *place == shard => drop(weights.tensors.insert(name, entry)),
                    place => strangers.push((shard, name, place.map(|place| shown(place)))),
                }
            }
        }
        if !absent.is_empty() {
            return Err(CheckpointError::MissingShards { index: index_path, shards: absent });
        }
        let mut missing = places.iter().filter(|(name, _)| !weights.tensors.contains_key(**name));
        if let Some((tensor, shard)) = missing.next() {
            let (tensor, shard, more) = (shown(tensor), shown(shard), missing.count());
            return Err(CheckpointError::NotInShard { index: index_path, tensor, shard, more });
        }
        let more = strangers.len().saturating_sub(1);
        match strangers.into_iter().next() {
            Some((shard, name, placed)) => {
                let file = folder.path().join(shard);
                Err(CheckpointError::NotInIndex { file, tensor: shown(&name), placed, more })
            }
            None => Ok(weights),
        }
    }

    pub(super) fn empty(folder: &Folder) -> Weights {
        let folder = folder.path().to_owned();
        Weights { folder, files: Vec::new(), tensors: BTreeMap::new(), indexes: Vec::new(), joined: None }
    }

    /// Gives the open files' tensors other names, by place or as expressions over them.
    pub(super) fn present(&mut self, tensors: BTreeMap<String, TensorEntry>, joined: Joined) {
        self.tensors = tensors;
        self.joined = Some(Box::new(joined));
    }

    /// Takes over the weights of a part, `PART.` put before their names.
    pub(super) fn join(&mut self, part: &str, other: Weights) {
        let before = self.files.len();
        let tensors = other.tensors.into_iter();
        self.tensors.extend(
            tensors.map(|(name, entry)| (format!("{part}.{name}"), TensorEntry { file: before + entry.file, ..entry })),
        );
        self.files.extend(other.files);
        self.indexes.extend(other.indexes);
    }

    /// Keeps a file open and gives what its header says.
    pub(super) fn add(
        &mut self,
        path: PathBuf,
        file: File,
    ) -> Result<impl Iterator<Item = (String, TensorEntry)> + use<>, CheckpointError> {
        let watched = Watched::new(path, &file)?;
        let located = read_header(&watched.path, &file, watched.identity.bytes)?;
        let index = self.files.len();
        self.files.push(OpenFile { file, watched });
        Ok(located.into_iter().map(move |(name, Located { dtype, shape, offset, bytes })| {
            (name, TensorEntry { file: index, dtype, shape, offset, bytes })
        }))
    }

    /// The folder, as it was given.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The files, in the order that [`TensorEntry::file`] counts.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.files.iter().map(|file| file.watched.path.as_path())
    }

    /// The file that a tensor lies in.
    pub fn path_of(&self, entry: &TensorEntry) -> Option<&Path> {
        self.files.get(entry.file).map(|file| file.watched.path.as_path())
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.get(name)
    }

    pub(super) fn all(&self) -> &BTreeMap<String, TensorEntry> {
        &self.tensors
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &TensorEntry)> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// Fills `buffer` with the bytes of a tensor from `offset_in_tensor` on. Threads may read at the same time.
    pub fn read_into(&self, name: &str, offset_in_tensor: u64, buffer: &mut [u8]) -> Result<(), CheckpointError> {
        let Some(entry) = self.tensors.get(name) else {
            let nearest = nearest(name, self.tensors.keys().map(String::as_str)).map(str::to_owned);
            return Err(CheckpointError::NoTensor { folder: self.folder.clone(), tensor: shown(name), nearest });
        };
        match self.joined.as_ref().and_then(|joined| Some((joined, joined.expression(name)?))) {
            Some((joined, weight)) => {
                let (tensor, end) = (shown(name), u128::from(offset_in_tensor) + buffer.len() as u128);
                if end > u128::from(entry.bytes) {
                    let (file, begin, found) = (self.folder.clone(), offset_in_tensor, entry.bytes);
                    return Err(CheckpointError::Range { file, tensor, begin, end, found });
                }
                let read = joined.read(self, weight, offset_in_tensor, buffer);
                read.map_err(|source| CheckpointError::Joined { tensor, source: Box::new(source) })
            }
            None => self.read_entry(name, entry, offset_in_tensor, buffer),
        }
    }

    /// The same for a tensor whose place is known.
    pub(super) fn read_entry(
        &self,
        name: &str,
        entry: &TensorEntry,
        offset_in_tensor: u64,
        buffer: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let Some(open) = self.files.get(entry.file) else {
            return Err(CheckpointError::NoTensor { folder: self.folder.clone(), tensor: shown(name), nearest: None });
        };
        let (file, tensor) = (open.watched.path.clone(), shown(name));
        let end = u128::from(offset_in_tensor) + buffer.len() as u128;
        if end > u128::from(entry.bytes) {
            return Err(CheckpointError::Range { file, tensor, begin: offset_in_tensor, end, found: entry.bytes });
        }
        let offset = entry.offset + offset_in_tensor;
        let wanted = buffer.len();
        open.file.read_exact_at(buffer, offset).map_err(|source| CheckpointError::Read {
            file,
            tensor,
            offset,
            wanted,
            source,
        })
    }

    /// Checks that every file still is the one that was opened: same device, inode, size and time of change.
    pub fn unchanged(&self) -> Result<(), CheckpointError> {
        self.files.iter().map(|file| &file.watched).chain(&self.indexes).try_for_each(Watched::unchanged)
    }
}

fn weight_map<'v>(path: &Path, index: &'v Value) -> Result<BTreeMap<&'v str, &'v str>, CheckpointError> {
    let wrong = |fault: String| CheckpointError::Index { path: path.to_owned(), fault };
    let map = match index.get("weight_map") {
        Some(Value::Object(map)) if map.is_empty() => return Err(wrong("`weight_map` is empty".into())),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(wrong(format!("`weight_map` is {}, wanted an object", json::kind(other)))),
        None => return Err(wrong("`weight_map` is missing".into())),
    };
    map.iter()
        .map(|(name, shard)| {
            let place = |fault: &str| wrong(format!("the shard of `{}` is {fault}", shown(name)));
            let shard = shard.as_str().ok_or_else(|| place(&format!("{}, wanted a file name", json::kind(shard))))?;
            match not_plain(shard) {
                Some(reason) => Err(place(&format!("named `{}`, {reason}", shown(shard)))),
                None => Ok((name.as_str(), shard)),
            }
        })
        .collect()
}

fn read_header(path: &Path, file: &File, file_bytes: u64) -> Result<BTreeMap<String, Located>, CheckpointError> {
    let failed = |source| CheckpointError::Io { path: path.to_owned(), source };
    let broken = |fault| CheckpointError::Header { file: path.to_owned(), fault: Box::new(fault) };
    let mut start = vec![0; file_bytes.min(8) as usize];
    if path.extension().is_some_and(|ending| ending == "bin") {
        return torch_bin::tensors(file, file_bytes).map_err(|fault| match fault {
            BinFault::Read(source) => failed(source),
            fault => CheckpointError::Bin { file: path.to_owned(), fault: Box::new(fault) },
        });
    }
    file.read_exact_at(&mut start, 0).map_err(failed)?;
    let bytes = header::header_bytes(&start, file_bytes).map_err(broken)?;
    // At most MAX_HEADER, and the file is known to be that long.
    let mut text = vec![0; bytes as usize];
    file.read_exact_at(&mut text, 8).map_err(failed)?;
    header::parse(&text, file_bytes).map_err(broken)
}

/// A file as it was when it was opened.
#[derive(Debug)]
pub(crate) struct Watched {
    path: PathBuf,
    identity: Identity,
}

#[derive(Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Identity {
    fn of(metadata: &Metadata) -> Identity {
        Identity {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

impl Watched {
    pub(crate) fn new(path: PathBuf, file: &File) -> Result<Watched, CheckpointError> {
        match file.metadata() {
            Ok(metadata) => Ok(Watched { path, identity: Identity::of(&metadata) }),
            Err(source) => Err(CheckpointError::Io { path, source }),
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.identity.bytes
    }

    pub(crate) fn unchanged(&self) -> Result<(), CheckpointError> {
        let before = &self.identity;
        let what = match self.path.metadata().map(|metadata| Identity::of(&metadata)) {
            Ok(now) if now == *before => return Ok(()),
            Ok(now) if (now.device, now.inode) != (before.device, before.inode) => "another file is there now".into(),
            Ok(now) if now.bytes != before.bytes => format!("{} bytes found, {} wanted", now.bytes, before.bytes),
            Ok(_) => "it was written to".into(),
            Err(error) => error.to_string(),
        };
        Err(CheckpointError::Changed { path: self.path.clone(), what })
    }
}
