use super::fault::HeaderFault;
use super::pickle::MAX_PICKLE;
use super::state_dict::STORAGES;
use std::io;

/// What is wrong with a PyTorch `.bin` file. Sizes and places are in bytes, but for counts and strides of elements.
#[derive(Debug, thiserror::Error)]
pub enum BinFault {
    #[error("the file cannot be read: {0}")]
    Read(io::Error),
    #[error("the file is empty")]
    Empty,
    #[error("a Git LFS pointer was found, a PyTorch file wanted")]
    LfsPointer,
    #[error("a web page was found, a PyTorch file wanted")]
    WebPage,
    #[error("the file is a tar, as of the first PyTorch, only the zip format is read")]
    OldTar,
    #[error("the file is a bare pickle, as of PyTorch before 1.6, only the zip format is read")]
    OldPickle,
    #[error("the file is no zip archive, as PyTorch writes them")]
    NotZip,
    #[error("no zip directory ends the file: it is cut, or something was added")]
    NoDirectory,
    #[error("the zip's 64-bit end record is not where it must be")]
    LargeEnd,
    #[error("the zip is split over several files")]
    Disks,
    #[error("the zip claims {found} records, the limit is {limit}")]
    TooManyRecords { found: u64, limit: u64 },
    #[error("the zip directory claims {found} bytes for {records} records")]
    DirectorySize { found: u64, records: u64 },
    #[error("the zip directory claims bytes {start} and {bytes} more, wanted them to end at {wanted}")]
    DirectoryPlace { start: u64, bytes: u64, wanted: u64 },
    #[error("the zip directory ends inside an entry")]
    DirectoryCut,
    #[error("the zip directory has {bytes} bytes that belong to no entry")]
    DirectoryLeft { bytes: usize },
    #[error("a record is named `{record}`, wanted a short name in UTF-8")]
    RecordName { record: String },
    #[error("record `{record}` appears twice")]
    RecordTwice { record: String },
    #[error("record `{record}` is encrypted")]
    Encrypted { record: String },
    #[error("record `{record}` is compressed (method {method}), only stored ones are read")]
    Compressed { record: String, method: u64 },
    #[error("record `{record}` lacks its 64-bit sizes")]
    LargeExtra { record: String },
    #[error("record `{record}` is stored in {packed} bytes and claims to be {bytes}")]
    RecordSizes { record: String, packed: u64, bytes: u64 },
    #[error("record `{record}` claims byte {offset} and {bytes} more, the records end at {limit}")]
    RecordOutside { record: String, offset: u64, bytes: u64, limit: u64 },
    #[error("record `{record}` overlaps `{before}`")]
    RecordOverlap { record: String, before: String },
    #[error("record `{record}` does not begin at byte {offset}, where the zip directory places it")]
    LocalHeader { record: String, offset: u64 },
    #[error("record `data.pkl` is missing")]
    NoStateDict,
    #[error("the file holds {found} records `data.pkl`, wanted one")]
    StateDicts { found: usize },
    #[error("the file is a TorchScript program, a state dict is wanted")]
    Script,
    #[error("the file was written on a machine of byte order `{found}`, only `little` is read")]
    ByteOrder { found: String },
    #[error("record `data.pkl` has {found} bytes, the limit is {MAX_PICKLE}")]
    PickleSize { found: u64 },
    #[error("`data.pkl` does not begin as a pickle")]
    NoPickle,
    #[error("`data.pkl` is of pickle protocol {found}, wanted 2")]
    Protocol { found: u64 },
    #[error("`data.pkl` ends inside the opcode at byte {at}")]
    PickleCut { at: usize },
    #[error("`data.pkl` ends with {bytes} bytes and {values} values left over")]
    PickleLeft { bytes: usize, values: usize },
    #[error("`data.pkl` has opcode 0x{code:02x} at byte {at}, which no state dict needs and which is never run")]
    Opcode { code: u8, at: usize },
    #[error("`data.pkl` asks for `{found}`, which no state dict needs and which is never run")]
    Global { found: String },
    #[error("`data.pkl` asks for `torch.{found}`, wanted one of {}", known_storages())]
    Storage { found: String },
    #[error("`data.pkl` calls a storage type at byte {at}, which no state dict does")]
    Called { at: usize },
    #[error("`data.pkl` takes a value at byte {at} where there is none")]
    Underflow { at: usize },
    #[error("`data.pkl` has {found} at byte {at}, wanted {wanted}")]
    Kind { at: usize, found: &'static str, wanted: &'static str },
    #[error("`data.pkl` has a text at byte {at} that is not UTF-8")]
    NotText { at: usize },
    #[error("`data.pkl` has a number of {bytes} bytes at byte {at}, at most 8 are read")]
    LongInt { at: usize, bytes: usize },
    #[error("`data.pkl` names place {found} of its memory at byte {at}, {filled} are filled")]
    Memo { at: usize, found: u64, filled: usize },
    #[error("`data.pkl` has more than {limit} opcodes")]
    Steps { limit: usize },
    #[error("`data.pkl` holds more than {limit} values at once")]
    StackSize { limit: usize },
    #[error("`data.pkl` holds {found}, wanted a dict of tensors")]
    Top { found: &'static str },
    #[error("the state dict has {found} as a key, wanted a name")]
    Key { found: &'static str },
    #[error("the state dict holds {found} under `{entry}`, wanted a tensor")]
    Entry { entry: String, found: &'static str },
    #[error("tensor `{tensor}` appears twice in the state dict")]
    Duplicate { tensor: String },
    #[error("tensor `{tensor}` has {found} as a size or a stride, wanted a number")]
    Size { tensor: String, found: &'static str },
    #[error(
        "tensor `{tensor}` has a negative size, stride or place: shape {shape:?}, strides {stride:?}, place {first}"
    )]
    Negative { tensor: String, shape: Vec<i64>, stride: Vec<i64>, first: i64 },
    #[error("tensor `{tensor}` of shape {shape:?} has strides {found:?}, wanted the contiguous {wanted:?}")]
    Strides { tensor: String, shape: Vec<usize>, found: Vec<i64>, wanted: Vec<u64> },
    #[error("tensor `{tensor}` lies in record `{record}`, which is missing")]
    NoRecord { tensor: String, record: String },
    #[error("record `{record}` of tensor `{tensor}` has {found} bytes, wanted {wanted}")]
    RecordSize { tensor: String, record: String, found: u64, wanted: String },
    #[error("record `{record}` of tensor `{tensor}` is {found} here and {before} before")]
    TwoTypes { tensor: String, record: String, found: String, before: String },
    #[error("tensor `{tensor}` reaches element {end} of its storage, which has {found}")]
    Past { tensor: String, end: u64, found: u64 },
    #[error(transparent)]
    Tensor(#[from] HeaderFault),
}

impl BinFault {
    /// What the user can do about it, where that is clear.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            BinFault::Empty | BinFault::NoDirectory => {
                "the download or copy was cut short: delete this file and fetch it again"
            }
            BinFault::LfsPointer => "run `git lfs pull` in the folder",
            BinFault::WebPage => "a download saved an error page under this name: delete the file and fetch it again",
            BinFault::OldTar | BinFault::OldPickle | BinFault::Protocol { .. } | BinFault::ByteOrder { .. } => {
                "load it with PyTorch where you trust it, and save it again as safetensors"
            }
            BinFault::Strides { .. } | BinFault::Entry { .. } | BinFault::Storage { .. } => {
                "save the model again as safetensors: load it with transformers and call `save_pretrained(folder)`"
            }
            BinFault::Opcode { .. } | BinFault::Global { .. } | BinFault::Called { .. } => {
                "a pickle like this can run code: ask where it comes from, and do not load it with PyTorch either"
            }
            BinFault::Tensor(fault) => return fault.hint(),
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

fn known_storages() -> String {
    STORAGES.map(|(name, _)| name).join(", ")
}
