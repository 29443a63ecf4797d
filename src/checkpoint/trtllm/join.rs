//! Tensors of Hugging Face's names out of those of all ranks. Nothing is copied: each is a place in a file, or an expression
//! that is read by position when it is asked for.
use super::fault::RankFault;
use super::layout::{ACTIVATION, Field, Form, PRESCALE, Part, SCALE, Split, extras};
use super::made::{Made, MadeTensors, turned};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::weights::{TensorEntry, Weights};
use graphs::{DType, Weight};
use quant::{Entry, Source, SourceError};
use std::collections::{BTreeMap, BTreeSet};

/// One rank's file.
pub(super) struct RankFile {
    /// In the checkpoint's folder.
    pub(super) name: String,
    pub(super) tensors: BTreeMap<String, TensorEntry>,
}

impl RankFile {
    fn key(&self, tensor: &str) -> String {
        format!("{}:{tensor}", self.name)
    }
}

/// What is read as an expression over the ranks' tensors.
#[derive(Debug, Default)]
pub(crate) struct Joined {
    ranks: BTreeMap<String, TensorEntry>,
    made: MadeTensors,
    expressions: BTreeMap<String, Weight>,
}

impl Joined {
    pub(crate) fn expression(&self, name: &str) -> Option<&Weight> {
        self.expressions.get(name)
    }

    /// Fills `buffer` with the bytes of an expression.
    pub(crate) fn read(
        &self,
        weights: &Weights,
        weight: &Weight,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), quant::QuantError> {
        let ranks = RankSource { weights, ranks: &self.ranks };
        quant::read_plain(weight, &self.made.over(&ranks), offset, buffer)
    }
}

struct RankSource<'w> {
    weights: &'w Weights,
    ranks: &'w BTreeMap<String, TensorEntry>,
}

impl Source for RankSource<'_> {
    fn entry(&self, name: &str) -> Option<Entry> {
        self.ranks.get(name).map(|entry| Entry { dtype: entry.dtype, shape: entry.shape.clone() })
    }

    fn read(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let missing = || SourceError::new(format!("there is no `{name}`"));
        let entry = self.ranks.get(name).ok_or_else(missing)?;
        self.weights.read_entry(name, entry, offset, buffer).map_err(SourceError::new)
    }
}

/// Joins the files of one folder's ranks after the other.
pub(super) struct Joiner<'w> {
    weights: &'w Weights,
    /// Matrices hold two integers in a byte.
    int4: bool,
    pub(super) joined: Joined,
    /// What a model finds.
    pub(super) presented: BTreeMap<String, TensorEntry>,
}

impl<'w> Joiner<'w> {
    pub(super) fn new(weights: &'w Weights, int4: bool) -> Joiner<'w> {
        Joiner { weights, int4, joined: Joined::default(), presented: BTreeMap::new() }
    }

    pub(super) fn folder(&mut self, files: &[RankFile], fields: &[Field]) -> Result<(), JoinError> {
        for file in files {
            let tensors = file.tensors.iter().map(|(name, entry)| (file.key(name), entry.clone()));
            self.joined.ranks.extend(tensors);
        }
        let Some(first) = files.first() else { return Ok(()) };
        let mut known = BTreeSet::new();
        for field in fields {
            let extras = if field.linear { found_extras(field, first, files.len()) } else { Vec::new() };
            for field in std::iter::once(field).chain(&extras) {
                if first.tensors.contains_key(&field.name) {
                    known.insert(field.name.clone());
                    self.field(field, files)?;
                }
            }
        }
        for file in files {
            let strange: Vec<String> = file.tensors.keys().filter(|name| !known.contains(*name)).cloned().collect();
            let kernels = strange.iter().find(|name| name.ends_with(".per_channel_scale"));
            match (kernels, strange.is_empty()) {
                (_, true) => (),
                (Some(tensor), _) => {
                    return Err(RankFault::Kernels { file: file.name.clone(), tensor: tensor.clone() }.into());
                }
                _ => return Err(RankFault::Unknown { file: file.name.clone(), tensors: strange }.into()),
            }
        }
        Ok(())
    }

    fn field(&mut self, field: &Field, files: &[RankFile]) -> Result<(), JoinError> {
        let entries = alike(field, files)?;
        let first = entries[0];
        if field.split == Split::Whole && field.name.ends_with("scaling_factor") {
            self.check_equal(field, files, &entries)?;
        }
        if field.copy {
            return Ok(());
        }
        let wrong = |wanted: String| RankFault::Shape {
            file: files[0].name.clone(),
            tensor: field.name.clone(),
            found: first.shape.clone(),
            wanted,
        };
        let packed = field.linear && self.int4 && first.dtype == DType::Int8;
        let tensors: Vec<Weight> =
            files.iter().map(|file| Weight::tensor(file.key(&field.name), &first.shape)).collect();
        let rows = first.shape.first().copied().unwrap_or(1);
        match field.split {
            Split::Whole => {
                for part in &field.parts {
                    self.present(part, field.form, first, tensors[0].clone(), packed)?;
                }
            }
            Split::Columns => {
                if first.shape.len() != 2 {
                    return Err(wrong("a matrix".into()).into());
                }
                for part in &field.parts {
                    self.present(part, field.form, first, concat(1, tensors.clone()), packed)?;
                }
            }
            Split::Words => {
                for part in &field.parts {
                    let wanted = part.rows().div_ceil(files.len());
                    if rows != wanted || first.shape.is_empty() {
                        return Err(
                            wrong(format!("{wanted} rows of the {} in {} ranks", part.rows(), files.len())).into()
                        );
                    }
                    let words = slice(0..part.rows(), rows * files.len(), concat(0, tensors.clone()));
                    self.present(part, field.form, first, words, packed)?;
                }
            }
            Split::Rows => {
                let per_row = if packed { 2 } else { 1 };
                let pieces = pieces(field, files.len(), per_row)?;
                let total = pieces.iter().map(|ranges| ranges[0].len()).sum::<usize>();
                if rows != total || first.shape.is_empty() {
                    return Err(wrong(format!("{total} rows, as config.json has its heads and sizes")).into());
                }
                for (part, ranges) in field.parts.iter().zip(pieces) {
                    let own = ranges.iter().zip(&tensors).filter(|(range, _)| !range.is_empty());
                    let own = own.map(|(range, tensor)| slice(range.clone(), rows, tensor.clone())).collect();
                    self.present(part, field.form, first, concat(0, own), packed)?;
                }
            }
        }
        Ok(())
    }

    /// What is rounded by the same numbers on all ranks must have the same numbers.
    fn check_equal(&self, field: &Field, files: &[RankFile], entries: &[&TensorEntry]) -> Result<(), JoinError> {
        let bytes = |entry: &TensorEntry| {
            let mut bytes = vec![0; entry.bytes as usize];
            self.weights.read_entry(&field.name, entry, 0, &mut bytes).map(|()| bytes)
        };
        let first = bytes(entries[0])?;
        for (file, entry) in files.iter().zip(entries).skip(1) {
            if bytes(entry)? != first {
                return Err(RankFault::Differs { file: file.name.clone(), tensor: field.name.clone() }.into());
            }
        }
        Ok(())
    }

    /// Gives a part to the model, under its own name and in its own form.
    fn present(
        &mut self,
        part: &Part,
        form: Form,
        like: &TensorEntry,
        weight: Weight,
        packed: bool,
    ) -> Result<(), JoinError> {
        let (mut weight, mut shape) = (weight.clone(), weight.shape());
        let name = part.name.clone();
        match form {
            Form::Same => (),
            Form::Flat => shape.insert(0, 1),
            Form::Tail(rows) => {
                let mut missing = shape.clone();
                missing[0] = rows;
                let zeros = format!("zeros:{name}");
                self.joined.made.insert(&zeros, like.dtype, &missing, Made::Zeros);
                weight = concat(0, vec![Weight::tensor(zeros, &missing), weight]);
                shape[0] += rows;
            }
            Form::Turned => {
                let [rows, columns] = shape[..] else {
                    return Err(RankFault::Config { reason: format!("`{name}` is no matrix") }.into());
                };
                let size = like.dtype.bytes(1);
                let mut bytes = vec![0; rows * columns * size];
                let failed = |source| CheckpointError::Joined { tensor: name.clone(), source: Box::new(source) };
                self.joined.read(self.weights, &weight, 0, &mut bytes).map_err(failed)?;
                shape = vec![columns, rows];
                let own = format!("turned:{name}");
                self.joined.made.insert(&own, like.dtype, &shape, Made::Bytes(turned(&bytes, rows, columns, size)));
                weight = Weight::tensor(own, &shape);
            }
        }
        let bytes = like.dtype.bytes(shape.iter().product()) as u64;
        let dtype = if packed { DType::Uint8 } else { like.dtype };
        let entry = match self.place(&weight) {
            Some((file, offset)) => TensorEntry { file, dtype, shape, offset, bytes },
            None => {
                self.joined.expressions.insert(name.clone(), weight);
                TensorEntry { file: usize::MAX, dtype, shape, offset: 0, bytes }
            }
        };
        self.presented.insert(name, entry);
        Ok(())
    }

    /// Adds a tensor of zeros.
    pub(super) fn zeros(&mut self, name: &str, dtype: DType, shape: &[usize]) {
        let own = format!("zeros:{name}");
        self.joined.made.insert(&own, dtype, shape, Made::Zeros);
        self.joined.expressions.insert(name.into(), Weight::tensor(own, shape));
        let bytes = dtype.bytes(shape.iter().product()) as u64;
        let entry = TensorEntry { file: usize::MAX, dtype, shape: shape.to_vec(), offset: 0, bytes };
        self.presented.insert(name.into(), entry);
    }

    /// The file and the offset of what lies in one piece.
    fn place(&self, weight: &Weight) -> Option<(usize, u64)> {
        match weight {
            Weight::Tensor { name, .. } => self.joined.ranks.get(name).map(|entry| (entry.file, entry.offset)),
            Weight::Slice { axis: 0, start, of, .. } => {
                let Weight::Tensor { name, shape } = &**of else { return None };
                let entry = self.joined.ranks.get(name)?;
                let row = entry.dtype.bytes(shape.iter().skip(1).product());
                Some((entry.file, entry.offset + (start * row) as u64))
            }
            _ => None,
        }
    }
}

/// A field's tensors in all files, of one type and shape.
fn alike<'f>(field: &Field, files: &'f [RankFile]) -> Result<Vec<&'f TensorEntry>, JoinError> {
    let (tensor, mut entries) = (field.name.clone(), Vec::<&TensorEntry>::new());
    for RankFile { name: file, tensors } in files {
        let file = file.clone();
        let entry = tensors.get(&tensor);
        let entry = entry.ok_or_else(|| RankFault::MissingTensor { file: file.clone(), tensor: tensor.clone() })?;
        match entries.first() {
            Some(first) if first.dtype != entry.dtype => {
                return Err(RankFault::Type { file, tensor, found: entry.dtype, wanted: first.dtype }.into());
            }
            Some(first) if first.shape != entry.shape => {
                let wanted = format!("{:?} as in rank 0", first.shape);
                return Err(RankFault::Shape { file, tensor, found: entry.shape.clone(), wanted }.into());
            }
            _ => entries.push(entry),
        }
    }
    Ok(entries)
}

/// For each part the rows of every rank's tensor that are its own; none where an earlier rank has the same heads.
/// `per_row` rows of the part share one of the tensor.
fn pieces(field: &Field, ranks: usize, per_row: usize) -> Result<Vec<Vec<std::ops::Range<usize>>>, RankFault> {
    let mut all = vec![Vec::new(); field.parts.len()];
    for rank in 0..ranks {
        let mut begin = 0;
        for (part, ranges) in field.parts.iter().zip(&mut all) {
            let share = |ranks| RankFault::Share {
                tensor: field.name.clone(),
                part: part.name.clone(),
                found: part.units,
                ranks,
            };
            let range = part.range(rank, ranks).ok_or_else(|| share(ranks))?;
            if !range.len().is_multiple_of(per_row) {
                return Err(share(ranks * per_row));
            }
            let rows = range.len() / per_row;
            let repeated = rank > 0 && part.range(rank - 1, ranks) == Some(range);
            ranges.push(if repeated { begin..begin } else { begin..begin + rows });
            begin += rows;
        }
    }
    Ok(all)
}

/// What a quantized layer has besides its matrix, by the first rank's shapes.
fn found_extras(field: &Field, first: &RankFile, ranks: usize) -> Vec<Field> {
    let stem = field.name.strip_suffix(".weight").unwrap_or(&field.name);
    let shape = |name: &str| first.tensors.get(&format!("{stem}.{name}")).map(|entry| &entry.shape[..]);
    let inputs = shape(PRESCALE).map(|shape| shape.first().map_or(0, |inputs| inputs.saturating_mul(ranks)));
    extras(field, shape(SCALE), inputs, shape(ACTIVATION).is_some())
}

fn concat(axis: usize, mut parts: Vec<Weight>) -> Weight {
    if parts.len() == 1 { parts.remove(0) } else { Weight::Concat { axis, parts } }
}

fn slice(range: std::ops::Range<usize>, rows: usize, of: Weight) -> Weight {
    if range == (0..rows) {
        return of;
    }
    Weight::Slice { axis: 0, start: range.start, end: range.end, of: Box::new(of) }
}

/// A fault of the files, or of reading them.
pub(super) enum JoinError {
    Fault(RankFault),
    Read(CheckpointError),
}

impl From<RankFault> for JoinError {
    fn from(fault: RankFault) -> JoinError {
        JoinError::Fault(fault)
    }
}

impl From<CheckpointError> for JoinError {
    fn from(error: CheckpointError) -> JoinError {
        JoinError::Read(error)
    }
}
