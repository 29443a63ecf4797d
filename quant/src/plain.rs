//! Weight expressions without quantization, read by rows: only the bytes that a block needs leave the source.
use crate::check::{joining, refuse, size, within};
use crate::{Entry, QuantError, Source, convert};
use graphs::{DType, Weight};
use std::ops::Range;
use std::sync::OnceLock;

/// Runs of at least this many bytes are read each on its own; shorter ones within their whole rows.
const DIRECT: usize = 4096;
/// Whole rows that are read to copy a part of them come in blocks of about this many bytes.
const BLOCK: usize = 1 << 20;

/// A checked plain expression. A row is an index of axis 0; a scalar has one row.
pub(crate) struct Plain<'a> {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    node: Node<'a>,
}

enum Node<'a> {
    Tensor(&'a str),
    Slice { axis: usize, start: usize, of: Box<Plain<'a>> },
    Concat { axis: usize, parts: Vec<Plain<'a>> },
    Scaled { axis: usize, by: Box<Plain<'a>>, divide: bool, of: Box<Plain<'a>>, vector: OnceLock<Vec<f32>> },
}

impl<'a> Plain<'a> {
    pub(crate) fn new(weight: &'a Weight, source: &dyn Source) -> Result<Plain<'a>, QuantError> {
        let plain = match weight {
            Weight::Tensor { name, shape } => {
                let entry = source.entry(name).ok_or_else(|| QuantError::Missing { tensor: name.clone() })?;
                if entry.shape != *shape {
                    let wanted = shape.clone();
                    return Err(QuantError::Shape { tensor: name.clone(), found: entry.shape, wanted });
                }
                if entry.dtype.bits() < 8 {
                    let wanted = "a type of whole bytes".into();
                    return Err(QuantError::Type { tensor: name.clone(), found: entry.dtype, wanted });
                }
                Plain { dtype: entry.dtype, shape: entry.shape, node: Node::Tensor(name) }
            }
            Weight::Slice { axis, start, end, of } => {
                let of = Plain::new(of, source)?;
                within(weight, *axis, *start, *end, &of.shape)?;
                let (dtype, shape) = (of.dtype, weight.shape());
                Plain { dtype, shape, node: Node::Slice { axis: *axis, start: *start, of: Box::new(of) } }
            }
            Weight::Concat { axis, parts } => {
                let parts = parts.iter().map(|part| Plain::new(part, source)).collect::<Result<Vec<_>, _>>()?;
                joining(weight, *axis, &parts.iter().map(|part| &part.shape[..]).collect::<Vec<_>>())?;
                let Some(dtype) = parts.first().map(|part| part.dtype) else {
                    return refuse(weight, "there are no parts".into());
                };
                if let Some(other) = parts.iter().find(|part| part.dtype != dtype) {
                    return refuse(weight, format!("parts are `{dtype}` and `{}`", other.dtype));
                }
                Plain { dtype, shape: weight.shape(), node: Node::Concat { axis: *axis, parts } }
            }
            Weight::Scaled { axis, by, divide, of } => {
                let (of, by) = (Plain::new(of, source)?, Plain::new(by, source)?);
                if !of.dtype.is_float() || !by.dtype.is_float() || of.shape.get(*axis..=*axis) != Some(&by.shape[..]) {
                    let (found, wanted) = (&by.shape, &of.shape);
                    return refuse(weight, format!("axis {axis} of {wanted:?} cannot be scaled by {found:?}"));
                }
                let (shape, by, of) = (of.shape.clone(), Box::new(by), Box::new(of));
                let node = Node::Scaled { axis: *axis, by, divide: *divide, of, vector: OnceLock::new() };
                Plain { dtype: DType::Float32, shape, node }
            }
            Weight::Packed { .. } => {
                return refuse(weight, "it is quantized twice, or joined with plain weights".into());
            }
        };
        size(weight, &plain.shape)?;
        Ok(plain)
    }

    /// The same tensor as one long axis, so that blocks of any size can be read from it; others stay as they are.
    pub(crate) fn flat(mut self) -> Plain<'a> {
        if let Node::Tensor(_) = self.node {
            self.shape = vec![self.shape.iter().product()];
        }
        self
    }

    pub(crate) fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    pub(crate) fn row_bytes(&self) -> usize {
        self.dtype.bytes(self.shape.iter().skip(1).product())
    }

    /// Reads rows `first..` into `buffer`, as many as it holds.
    pub(crate) fn read(&self, source: &dyn Source, first: usize, buffer: &mut [u8]) -> Result<(), QuantError> {
        let row_bytes = self.row_bytes();
        if buffer.is_empty() || row_bytes == 0 {
            return Ok(());
        }
        match &self.node {
            Node::Tensor(name) => read(source, name, first * row_bytes, buffer),
            Node::Slice { axis: 0, start, of } => of.read(source, start + first, buffer),
            Node::Slice { axis, start, of } => {
                let run = self.run_bytes(*axis);
                let whole = of.run_bytes(*axis);
                let skip = whole / of.shape.get(*axis).copied().unwrap_or(1).max(1) * start;
                if let (Node::Tensor(name), DIRECT..) = (&of.node, run) {
                    let first = first * (row_bytes / run);
                    for (at, run) in buffer.chunks_exact_mut(run).enumerate() {
                        read(source, name, (first + at) * whole + skip, run)?;
                    }
                    return Ok(());
                }
                let rows = (BLOCK / of.row_bytes()).max(1);
                let mut scratch = Vec::new();
                for (at, block) in buffer.chunks_mut(rows * row_bytes).enumerate() {
                    scratch.resize(block.len() / row_bytes * of.row_bytes(), 0);
                    of.read(source, first + at * rows, &mut scratch)?;
                    for (run, whole) in block.chunks_exact_mut(run).zip(scratch.chunks_exact(whole)) {
                        run.copy_from_slice(&whole[skip..skip + run.len()]);
                    }
                }
                Ok(())
            }
            Node::Scaled { axis, by, divide, of, vector } => {
                let vector = match vector.get() {
                    Some(vector) => vector,
                    None => {
                        let found = by.values(source)?;
                        vector.get_or_init(|| found)
                    }
                };
                let (row, inner) = (self.shape.iter().skip(1).product(), self.shape.iter().skip(axis + 1).product());
                let (row, inner): (usize, usize) = (row, inner);
                let mut scratch = vec![0; of.dtype.bytes(buffer.len() / self.dtype.bytes(1))];
                of.read(source, first, &mut scratch)?;
                let values = convert::to_f32(of.dtype, &scratch).into_iter().enumerate();
                for ((at, value), into) in values.zip(buffer.as_chunks_mut::<4>().0) {
                    let factor = vector[(first * row + at) / inner % vector.len()];
                    *into = (if *divide { value / factor } else { value * factor }).to_le_bytes();
                }
                Ok(())
            }
            Node::Concat { axis: 0, parts } => {
                let (mut begin, last) = (0, first + buffer.len() / row_bytes);
                for part in parts {
                    let overlap: Range<usize> = first.max(begin)..last.min(begin + part.rows());
                    if !overlap.is_empty() {
                        let bytes = (overlap.start - first) * row_bytes..(overlap.end - first) * row_bytes;
                        part.read(source, overlap.start - begin, &mut buffer[bytes])?;
                    }
                    begin += part.rows();
                }
                Ok(())
            }
            Node::Concat { axis, parts } => {
                let (run, rows) = (self.run_bytes(*axis), buffer.len() / row_bytes);
                let (mut scratch, mut skip) = (Vec::new(), 0);
                for part in parts {
                    let own = part.run_bytes(*axis);
                    if own == 0 {
                        continue;
                    }
                    scratch.resize(rows * part.row_bytes(), 0);
                    part.read(source, first, &mut scratch)?;
                    for (whole, own) in buffer.chunks_exact_mut(run).zip(scratch.chunks_exact(own)) {
                        whole[skip..skip + own.len()].copy_from_slice(own);
                    }
                    skip += own;
                }
                Ok(())
            }
        }
    }

    /// All of it in float32.
    pub(crate) fn values(&self, source: &dyn Source) -> Result<Vec<f32>, QuantError> {
        let mut bytes = vec![0; self.dtype.bytes(self.shape.iter().product())];
        self.read(source, 0, &mut bytes)?;
        Ok(convert::to_f32(self.dtype, &bytes))
    }

    /// Bytes of one run along `axis`: everything from that axis on.
    fn run_bytes(&self, axis: usize) -> usize {
        self.dtype.bytes(self.shape.iter().skip(axis).product())
    }

    /// The checkpoint tensor that an element comes from, and its place there.
    pub(crate) fn locate(&self, mut index: Vec<usize>) -> (String, Vec<usize>) {
        match &self.node {
            Node::Tensor(name) => (name.to_string(), index),
            Node::Scaled { of, .. } => of.locate(index),
            Node::Slice { axis, start, of } => {
                index[*axis] += start;
                of.locate(index)
            }
            Node::Concat { axis, parts } => {
                for part in parts {
                    if index[*axis] < part.shape[*axis] {
                        return part.locate(index);
                    }
                    index[*axis] -= part.shape[*axis];
                }
                (String::new(), index)
            }
        }
    }
}

/// Type and shape of an expression without quantization, from headers alone.
///
/// # Errors
/// A tensor that is missing or does not fit.
pub fn plain_entry(weight: &Weight, source: &dyn Source) -> Result<Entry, QuantError> {
    let Plain { dtype, shape, .. } = Plain::new(weight, source)?;
    Ok(Entry { dtype, shape })
}

/// Fills `buffer` with the bytes of an expression without quantization from `offset` on, in the type of its tensors.
///
/// # Errors
/// A tensor that does not fit, bytes beyond the end, or a read that fails.
pub fn read_plain(weight: &Weight, source: &dyn Source, offset: u64, buffer: &mut [u8]) -> Result<(), QuantError> {
    let plain = Plain::new(weight, source)?;
    let (row, whole) = (plain.row_bytes(), plain.row_bytes() * plain.rows());
    let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= whole as u64);
    let Some(end) = end.and_then(|end| usize::try_from(end).ok()) else {
        return refuse(weight, format!("{} bytes from {offset} on were asked for, it has {whole}", buffer.len()));
    };
    let start = end - buffer.len();
    if buffer.is_empty() {
        return Ok(());
    }
    if start.is_multiple_of(row) && end.is_multiple_of(row) {
        return plain.read(source, start / row, buffer);
    }
    let first = start / row;
    let mut rows = vec![0; (end.div_ceil(row) - first) * row];
    plain.read(source, first, &mut rows)?;
    let skip = start - first * row;
    buffer.copy_from_slice(&rows[skip..skip + buffer.len()]);
    Ok(())
}

fn read(source: &dyn Source, name: &str, offset: usize, buffer: &mut [u8]) -> Result<(), QuantError> {
    source.read(name, offset as u64, buffer).map_err(|source| QuantError::Read { tensor: name.to_string(), source })
}
