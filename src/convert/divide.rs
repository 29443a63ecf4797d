//! The tensors of one rank, as expressions over the model's.
use super::ConvertError;
use crate::checkpoint::trtllm::{ACTIVATION, Field, Form, Made, MadeTensors, SCALE, Split, extras, turned};
use graphs::{DType, Weight};
use quant::{Entry, Named, QuantError, Source, StoreSummary};
use std::path::Path;

pub(super) struct Divider<'d> {
    pub(super) source: &'d dyn Source,
    pub(super) ranks: usize,
    /// Of weights that are floats; scales stay as they are.
    pub(super) dtype: DType,
}

/// A tensor that the ranks do not share alike, and why.
pub(super) struct Uneven(String, String);

impl Uneven {
    pub(super) fn of(self, ranks: usize, possible: Vec<usize>) -> ConvertError {
        let Uneven(tensor, reason) = self;
        ConvertError::Share { tensor, ranks, reason, possible }
    }
}

impl Divider<'_> {
    /// Whether the model has what a field is made of.
    pub(super) fn has(&self, field: &Field) -> bool {
        field.parts.iter().all(|part| self.source.entry(&part.name).is_some())
    }

    /// The field and, of a quantized layer, those beside it.
    fn with_extras(&self, field: &Field) -> Vec<Field> {
        let mut fields = vec![field.clone()];
        let quantized = |entry: Entry| !entry.dtype.is_float();
        if let Some(part) = field.parts.first().filter(|_| field.linear)
            && self.source.entry(&part.name).is_some_and(quantized)
        {
            let shape = |ending: &str| self.source.entry(&part.beside(ending).name).map(|entry| entry.shape);
            let inputs = shape(".pre_quant_scale").map(|shape| shape.first().copied().unwrap_or(0));
            fields.extend(extras(field, shape(".weight_scale").as_deref(), inputs, shape(".input_scale").is_some()));
        }
        fields
    }

    /// Whether every rank gets its share of a field.
    pub(super) fn check(&self, field: &Field) -> Result<(), Uneven> {
        for field in self.with_extras(field).iter().filter(|field| self.has(field)) {
            for part in &field.parts {
                let Some(entry) = self.source.entry(&part.name) else { continue };
                let uneven = |reason: String| Err(Uneven(part.name.clone(), reason));
                match field.split {
                    Split::Whole | Split::Words => (),
                    Split::Columns => {
                        let columns = entry.shape.get(1).copied().unwrap_or(0);
                        if !columns.is_multiple_of(self.ranks) {
                            return uneven(format!("its {columns} columns do not divide by {} ranks", self.ranks));
                        }
                    }
                    Split::Rows => {
                        let range = part.range(0, self.ranks);
                        let what = if part.unit == 1 { "rows" } else { "heads" };
                        match range.filter(|range| range.len().is_multiple_of(per_row(field, &entry))) {
                            Some(_) => (),
                            None => {
                                let (units, ranks) = (part.units, self.ranks);
                                return uneven(format!("its {units} {what} are not shared alike by {ranks} ranks"));
                            }
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes the file of one rank.
    pub(super) fn store(
        &self,
        rank: usize,
        fields: &[Field],
        path: &Path,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<StoreSummary, ConvertError> {
        let (mut made, mut weights) = (MadeTensors::default(), Vec::new());
        for field in fields.iter().flat_map(|field| self.with_extras(field)).filter(|field| self.has(field)) {
            weights.extend(self.tensor(&field, rank, &mut made)?);
        }
        let source = made.over(self.source);
        quant::store_named(&weights, &source, path, progress).map_err(|source| failed(path, source))
    }

    /// One tensor; `None` where it is not written.
    fn tensor(&self, field: &Field, rank: usize, made: &mut MadeTensors) -> Result<Option<Named>, ConvertError> {
        let mut parts = Vec::new();
        for part in &field.parts {
            let Some(Entry { dtype, shape }) = self.source.entry(&part.name) else { return Ok(None) };
            let whole = Weight::tensor(&part.name, &shape);
            let rows = shape.first().copied().unwrap_or(1);
            let weight = match field.form {
                Form::Same if shape.is_empty() => {
                    // One number is a vector of one there.
                    self.other(&part.name, dtype, &[1], Made::Other(part.name.clone()), made)
                }
                Form::Same => whole,
                Form::Tail(first) => slice(0, first.min(rows)..rows, whole),
                Form::Flat => {
                    if self.bytes(&part.name)?.iter().all(|byte| *byte == 0) {
                        return Ok(None);
                    }
                    self.other(&part.name, dtype, &shape[1..], Made::Other(part.name.clone()), made)
                }
                Form::Turned => {
                    let columns = shape.get(1).copied().unwrap_or(1);
                    let bytes = turned(&self.bytes(&part.name)?, rows, columns, dtype.bytes(1));
                    self.other(&part.name, dtype, &[columns, rows], Made::Bytes(bytes), made)
                }
            };
            parts.push((part, Entry { dtype, shape: weight.shape() }, weight));
        }
        let Some((_, first, _)) = parts.first() else { return Ok(None) };
        let first = first.clone();
        let weight = match field.split {
            Split::Whole => {
                self.agreed(&parts.iter().map(|(part, ..)| part.name.as_str()).collect::<Vec<_>>(), &parts[0].2)?
            }
            Split::Columns => {
                let share = first.shape.get(1).copied().unwrap_or(0) / self.ranks;
                slice(1, rank * share..(rank + 1) * share, parts[0].2.clone())
            }
            Split::Words => {
                let (words, rows) = (first.shape[0], first.shape[0].div_ceil(self.ranks));
                let range = (rank * rows).min(words)..((rank + 1) * rows).min(words);
                let missing = rows - range.len();
                let mut pieces = vec![slice(0, range, parts[0].2.clone())];
                if missing > 0 {
                    let shape = [&[missing], &first.shape[1..]].concat();
                    pieces.push(self.other(&format!("{rank}:{}", field.name), first.dtype, &shape, Made::Zeros, made));
                    pieces.retain(|piece| piece.shape()[0] > 0);
                }
                concat(pieces)
            }
            Split::Rows => {
                let mut pieces = Vec::new();
                for (part, entry, weight) in &parts {
                    let Some(range) = part.range(rank, self.ranks) else { return Ok(None) };
                    let step = per_row(field, entry);
                    pieces.push(slice(0, range.start / step..range.end / step, weight.clone()));
                }
                concat(pieces)
            }
        };
        let dtype = match first.dtype {
            dtype if [SCALE, ACTIVATION].iter().any(|scale| field.name.ends_with(scale)) => dtype,
            dtype if dtype.is_float() => self.dtype,
            _ => DType::Int8,
        };
        Ok(Some(Named { name: field.name.clone(), weight, dtype }))
    }

    /// A made tensor under a name of its own.
    fn other(&self, name: &str, dtype: DType, shape: &[usize], tensor: Made, made: &mut MadeTensors) -> Weight {
        let own = format!("made:{name}");
        made.insert(&own, dtype, shape, tensor);
        Weight::tensor(own, shape)
    }

    /// What is one tensor there must be the same in all parts.
    fn agreed(&self, names: &[&str], weight: &Weight) -> Result<Weight, ConvertError> {
        if let [first, others @ ..] = names
            && !others.is_empty()
        {
            let bytes = self.bytes(first)?;
            for other in others {
                if self.bytes(other)? != bytes {
                    return Err(ConvertError::Differ { tensor: (*first).into(), other: (*other).into() });
                }
            }
        }
        Ok(weight.clone())
    }

    /// All of a small tensor.
    fn bytes(&self, name: &str) -> Result<Vec<u8>, ConvertError> {
        let count = self.source.entry(name).map_or(0, |entry| entry.dtype.bytes(entry.shape.iter().product()));
        let mut bytes = vec![0; count];
        let read = self.source.read(name, 0, &mut bytes);
        read.map_err(|source| ConvertError::Read { tensor: name.into(), source })?;
        Ok(bytes)
    }
}

fn failed(path: &Path, source: QuantError) -> ConvertError {
    ConvertError::Weights { file: path.to_owned(), source }
}

/// Outputs that share a row: two where a byte holds two integers.
fn per_row(field: &Field, entry: &Entry) -> usize {
    if field.linear && entry.dtype == DType::Uint8 { 2 } else { 1 }
}

fn concat(mut parts: Vec<Weight>) -> Weight {
    if parts.len() == 1 { parts.remove(0) } else { Weight::Concat { axis: 0, parts } }
}

fn slice(axis: usize, range: std::ops::Range<usize>, of: Weight) -> Weight {
    if of.shape().get(axis) == Some(&range.len()) {
        return of;
    }
    Weight::Slice { axis, start: range.start, end: range.end, of: Box::new(of) }
}
