//! Tensors that no file holds: zeros, and what lies in a file in another form.
use graphs::DType;
use quant::{Entry, Source, SourceError};
use std::collections::BTreeMap;

#[derive(Clone, Debug)]
pub(crate) enum Made {
    Zeros,
    Bytes(Vec<u8>),
    /// The tensor of this name in another shape.
    Other(String),
}

/// Made tensors by name.
#[derive(Debug, Default)]
pub(crate) struct MadeTensors(BTreeMap<String, (Entry, Made)>);

impl MadeTensors {
    pub(crate) fn insert(&mut self, name: impl Into<String>, dtype: DType, shape: &[usize], made: Made) {
        self.0.insert(name.into(), (Entry { dtype, shape: shape.to_vec() }, made));
    }

    /// The tensors of `base`, and these.
    pub(crate) fn over<'s>(&'s self, base: &'s dyn Source) -> impl Source + 's {
        Over { made: self, base }
    }
}

struct Over<'s> {
    made: &'s MadeTensors,
    base: &'s dyn Source,
}

impl Source for Over<'_> {
    fn entry(&self, name: &str) -> Option<Entry> {
        self.made.0.get(name).map(|(entry, _)| entry.clone()).or_else(|| self.base.entry(name))
    }

    fn read(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let Some((entry, made)) = self.made.0.get(name) else { return self.base.read(name, offset, buffer) };
        let bytes = entry.dtype.bytes(entry.shape.iter().product());
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(buffer.len());
        match made {
            Made::Other(other) => return self.base.read(other, offset, buffer),
            Made::Zeros if end <= bytes => buffer.fill(0),
            Made::Bytes(own) if end <= own.len() => buffer.copy_from_slice(&own[start..end]),
            _ => return Err(SourceError::new(format!("`{name}` has {bytes} bytes, wanted those up to {end}"))),
        }
        Ok(())
    }
}

/// The bytes of a matrix of elements of `size` bytes with its rows as columns.
pub(crate) fn turned(bytes: &[u8], rows: usize, columns: usize, size: usize) -> Vec<u8> {
    let element = |row: usize, column: usize| bytes.get((row * columns + column) * size..).unwrap_or_default();
    (0..columns)
        .flat_map(|column| (0..rows).flat_map(move |row| element(row, column).iter().take(size).copied()))
        .collect()
}
