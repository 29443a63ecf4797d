//! Where tensors come from: shapes first, data by positioned reads.
use graphs::DType;
use std::collections::BTreeMap;

/// Element type and shape of a tensor in a source.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub dtype: DType,
    pub shape: Vec<usize>,
}

/// Why a read failed, in words that carry the file.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SourceError(#[from] Box<dyn std::error::Error + Send + Sync>);

impl SourceError {
    pub fn new(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> SourceError {
        SourceError(error.into())
    }
}

/// Tensors by name. Reads come from several threads at once.
pub trait Source: Sync {
    /// Element type and shape, from headers alone; `None` if there is no such tensor.
    fn entry(&self, name: &str) -> Option<Entry>;

    /// Fills `buffer` with the bytes of the tensor from `offset` on, little endian, row-major.
    fn read(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError>;
}

/// Tensors held in memory.
#[derive(Default)]
pub struct MemorySource {
    tensors: BTreeMap<String, (Entry, Vec<u8>)>,
}

impl MemorySource {
    pub fn insert(&mut self, name: impl Into<String>, dtype: DType, shape: &[usize], bytes: Vec<u8>) {
        self.tensors.insert(name.into(), (Entry { dtype, shape: shape.to_vec() }, bytes));
    }
}

impl Source for MemorySource {
    fn entry(&self, name: &str) -> Option<Entry> {
        self.tensors.get(name).map(|tensor| tensor.0.clone())
    }

    fn read(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let bytes = self.tensors.get(name).map(|tensor| tensor.1.as_slice()).unwrap_or_default();
        let range = usize::try_from(offset).ok().and_then(|start| bytes.get(start..start.checked_add(buffer.len())?));
        let Some(range) = range else {
            return Err(SourceError::new(format!(
                "`{name}` has {} bytes, wanted {} from {offset} on",
                bytes.len(),
                buffer.len()
            )));
        };
        buffer.copy_from_slice(range);
        Ok(())
    }
}
