use super::header::{DTYPES, MAX_HEADER, MAX_RANK, MAX_TENSORS};
use graphs::DType;

/// What is wrong with a safetensors file. Sizes are in bytes; found and wanted file sizes are those of the whole file.
#[derive(Debug, thiserror::Error)]
pub enum HeaderFault {
    #[error("the file is empty")]
    Empty,
    #[error("the file ends inside its header: {found} bytes found, {wanted} wanted")]
    HeaderCut { found: u64, wanted: u64 },
    #[error("the header claims {found} bytes, the limit is {MAX_HEADER}")]
    HeaderSize { found: u64 },
    #[error("a Git LFS pointer was found, a safetensors file wanted")]
    LfsPointer,
    #[error("a web page was found, a safetensors file wanted")]
    WebPage,
    #[error("the header does not begin with `{{`")]
    NotObject,
    #[error("the header is not valid JSON: {cause}")]
    Json { cause: serde_json::Error },
    #[error("the header entry of tensor `{tensor}` is malformed: {cause}")]
    Entry { tensor: String, cause: serde_json::Error },
    #[error("`__metadata__` holds {found} under `{key}`, only strings are allowed")]
    Metadata { key: String, found: &'static str },
    #[error("tensor `{tensor}` appears twice in the header")]
    Duplicate { tensor: String },
    #[error("a tensor is named `{tensor}`, {reason}")]
    Name { tensor: String, reason: &'static str },
    #[error("more than {MAX_TENSORS} tensors")]
    TooMany,
    #[error("the file holds no tensors")]
    NoTensors,
    #[error("tensor `{tensor}` has dtype `{found}`, wanted one of {}", known_dtypes())]
    Dtype { tensor: String, found: String },
    #[error("tensor `{tensor}` has {found} dimensions, at most {MAX_RANK} are read")]
    Rank { tensor: String, found: usize },
    #[error("tensor `{tensor}` of shape {shape:?} has no elements")]
    ZeroSize { tensor: String, shape: Vec<u64> },
    #[error("tensor `{tensor}` of shape {shape:?} is larger than can be counted")]
    Overflow { tensor: String, shape: Vec<u64> },
    #[error("tensor `{tensor}` has data offsets [{begin}, {end}], which run backwards")]
    Backwards { tensor: String, begin: u64, end: u64 },
    #[error("tensor `{tensor}` ({dtype} {shape:?}) has {found} bytes of data, wanted {wanted}")]
    Size { tensor: String, dtype: &'static str, shape: Vec<u64>, found: u64, wanted: u64 },
    #[error("tensor `{tensor}` overlaps `{before}`: its data begins at {found}, wanted {wanted}")]
    Overlap { tensor: String, before: String, found: u64, wanted: u64 },
    #[error("there is a gap before tensor `{tensor}`: its data begins at {found}, wanted {wanted}")]
    Gap { tensor: String, found: u64, wanted: u64 },
    #[error("the file is cut: {found} bytes found, {wanted} wanted; `{tensor}` is the first tensor it cuts")]
    Truncated { tensor: String, found: u64, wanted: u64 },
    #[error("the file has bytes that belong to no tensor: {found} bytes found, {wanted} wanted")]
    Trailing { found: u64, wanted: u64 },
}

impl HeaderFault {
    /// What the user can do about it, where that is clear.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            HeaderFault::Empty | HeaderFault::HeaderCut { .. } | HeaderFault::Truncated { .. } => {
                "the download or copy was cut short: delete this file and fetch it again"
            }
            HeaderFault::LfsPointer => "run `git lfs pull` in the folder",
            HeaderFault::WebPage => {
                "a download saved an error page under this name: delete the file and fetch it again"
            }
            HeaderFault::Dtype { found, .. } if found.starts_with("F8") || found.starts_with("F4") => {
                "use the checkpoint that was not quantized before"
            }
            HeaderFault::Dtype { .. } => "convert the tensor to float32, float16 or bfloat16",
            HeaderFault::Duplicate { .. } | HeaderFault::Name { .. } | HeaderFault::Overlap { .. } => {
                "no common tool writes such a file: ask where it comes from"
            }
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

fn known_dtypes() -> String {
    DTYPES.map(DType::safetensors).join(", ")
}
