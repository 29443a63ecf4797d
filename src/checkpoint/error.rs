use super::bin_fault::BinFault;
use super::fault::HeaderFault;
use super::hub::HubError;
use super::quantized::QuantizedFault;
use super::trtllm::RankFault;
use std::io;
use std::path::{Path, PathBuf};

/// Why a checkpoint cannot be opened or read. Sizes are in bytes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    #[error("cannot read `{}`", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("`{model}` is neither a folder nor a hub id")]
    NotFound { model: String },
    #[error("`{}` is not a folder", path.display())]
    NotAFolder { path: PathBuf },
    #[error("`{}` is not a regular file", path.display())]
    NotAFile { path: PathBuf },
    #[error("`{}` is a link to `{}`, which does not exist", path.display(), target.display())]
    DanglingLink { path: PathBuf, target: PathBuf },
    #[error("`{}` leads to `{}`, outside of `{}`", path.display(), target.display(), root.display())]
    Outside { path: PathBuf, target: PathBuf, root: PathBuf },
    #[error("a file of `{}` is named `{name}`, {reason}", folder.display())]
    UnsafeName { folder: PathBuf, name: String, reason: &'static str },
    #[error("`{}` is missing", path.display())]
    MissingFile { path: PathBuf },
    #[error("the folder `{}` is missing, which config.json describes under `{key}`", folder.display())]
    MissingPart { folder: PathBuf, key: &'static str },
    #[error("`{}` is not valid JSON", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("`{}` holds {found}, wanted an object", path.display())]
    NotAnObject { path: PathBuf, found: &'static str },
    #[error("`{}` has {found} bytes, the limit for JSON is {wanted}", path.display())]
    JsonSize { path: PathBuf, found: u64, wanted: u64 },
    #[error("`{}` holds no weights: found neither `model.safetensors` nor `pytorch_model.bin` nor an index of either", folder.display())]
    NoWeights { folder: PathBuf },
    #[error("`{}` holds {} {kind} files and no index: {}", folder.display(), names.len(), listed(names))]
    ManyWeights { folder: PathBuf, names: Vec<String>, kind: &'static str, index: &'static str },
    #[error("`{}`: {fault}", path.display())]
    Index { path: PathBuf, fault: String },
    #[error("`{}` names shards that are missing: {}", index.display(), listed(shards))]
    MissingShards { index: PathBuf, shards: Vec<String> },
    #[error("`{}` places tensor `{tensor}` in `{shard}`, which does not hold it{}", index.display(), and_more(*more))]
    NotInShard { index: PathBuf, tensor: String, shard: String, more: usize },
    #[error("`{}` holds tensor `{tensor}`, which the index {}{}", file.display(), placed_text(placed), and_more(*more))]
    NotInIndex { file: PathBuf, tensor: String, placed: Option<String>, more: usize },
    #[error("`{}`: {fault}", file.display())]
    Header { file: PathBuf, fault: Box<HeaderFault> },
    #[error("`{}`: {fault}", file.display())]
    Bin { file: PathBuf, fault: Box<BinFault> },
    #[error("`{}` has no tensor `{tensor}`", folder.display())]
    NoTensor { folder: PathBuf, tensor: String, nearest: Option<String> },
    #[error("bytes {begin}..{end} of tensor `{tensor}` in `{}` were asked for, it has {found}", file.display())]
    Range { file: PathBuf, tensor: String, begin: u64, end: u128, found: u64 },
    #[error("cannot read {wanted} bytes at byte {offset} of `{}`, tensor `{tensor}`", file.display())]
    Read { file: PathBuf, tensor: String, offset: u64, wanted: usize, source: io::Error },
    #[error("`{}` was changed since it was opened: {what}", path.display())]
    Changed { path: PathBuf, what: String },
    #[error("`{}` is quantized in a way that cannot be kept: {fault}", folder.display())]
    Quantized { folder: PathBuf, fault: Box<QuantizedFault> },
    #[error("`{}`: {fault}", path.display())]
    Ranks { path: PathBuf, fault: Box<RankFault> },
    #[error("cannot join tensor `{tensor}` of the ranks' files")]
    Joined { tensor: String, source: Box<quant::QuantError> },
    #[error(transparent)]
    Hub(#[from] HubError),
}

impl CheckpointError {
    /// What the user can do about it, where that is clear.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            CheckpointError::NotFound { .. } => "give a folder, or a hub id as `org/name` or `org/name@revision`",
            CheckpointError::NotAFolder { .. } => "give the folder that holds config.json and the weights",
            CheckpointError::DanglingLink { .. } | CheckpointError::MissingShards { .. } => {
                "the download is incomplete: run it again"
            }
            CheckpointError::Outside { .. } => {
                "put the file itself into the folder: links may lead only inside it, or inside its hub cache entry"
            }
            CheckpointError::MissingFile { path } if path.ends_with("config.json") => {
                "give the folder that holds config.json and the weights"
            }
            CheckpointError::MissingPart { .. } => "give the folder that holds all parts, and fetch each of them",
            CheckpointError::ManyWeights { names, index, .. } if names.iter().any(|name| name.contains("-of-")) => {
                return Some(format!("fetch `{index}`, which says which tensor lies in which of them"));
            }
            CheckpointError::ManyWeights { index, .. } => {
                return Some(format!("name the one to be read `{}`", index.trim_end_matches(".index.json")));
            }
            CheckpointError::NotInShard { .. } | CheckpointError::NotInIndex { .. } => {
                "index and shards are of different versions: fetch all of them again"
            }
            CheckpointError::Changed { .. } => "build again, while nothing writes to the checkpoint",
            CheckpointError::Header { fault, .. } => return fault.hint(),
            CheckpointError::Bin { fault, .. } => return fault.hint(),
            CheckpointError::NoTensor { nearest, .. } => {
                return nearest.as_ref().map(|name| format!("did you mean `{name}`?"));
            }
            CheckpointError::Quantized { fault, .. } => return fault.hint(),
            CheckpointError::Ranks { fault, .. } => return fault.hint(),
            CheckpointError::Hub(error) => return error.hint(),
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

impl CheckpointError {
    /// The same with the folder of a quantized checkpoint, which its faults do not know.
    pub(super) fn of_folder(self, folder: &Path) -> CheckpointError {
        match self {
            CheckpointError::Quantized { fault, .. } => CheckpointError::Quantized { folder: folder.to_owned(), fault },
            other => other,
        }
    }
}

impl From<QuantizedFault> for CheckpointError {
    fn from(fault: QuantizedFault) -> CheckpointError {
        CheckpointError::Quantized { folder: PathBuf::new(), fault: Box::new(fault) }
    }
}

fn listed(names: &[String]) -> String {
    let shown: Vec<String> = names.iter().take(5).map(|name| format!("`{name}`")).collect();
    match names.len().saturating_sub(shown.len()) {
        0 => shown.join(", "),
        rest => format!("{} and {rest} more", shown.join(", ")),
    }
}

fn and_more(more: usize) -> String {
    match more {
        0 => String::new(),
        more => format!(" (and {more} more)"),
    }
}

fn placed_text(placed: &Option<String>) -> String {
    match placed {
        Some(shard) => format!("places in `{shard}`"),
        None => "does not list".to_owned(),
    }
}
