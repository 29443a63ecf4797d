//! A PyTorch `.bin` file: which tensors its state dict names and where in the file their bytes lie. Tensors are stored
//! uncompressed, so they are read by position afterwards, as those of safetensors are.
use super::HeaderFault;
use super::archive::{self, Record, records};
use super::bin_fault::BinFault;
use super::header::{Located, bad_name, shown};
use super::pickle::MAX_PICKLE;
use super::state_dict::{Pickled, state_dict};
use graphs::DType;
use std::collections::BTreeMap;
use std::fs::File;

/// The tensors of a file of `file_bytes` by name; reads the directory and the state dict only.
pub(crate) fn tensors(file: &File, file_bytes: u64) -> Result<BTreeMap<String, Located>, BinFault> {
    let records = records(file, file_bytes)?;
    let prefix = prefix(&records)?;
    let record = |name: &str| records.get(&format!("{prefix}/{name}")).copied();
    if record("constants.pkl").is_some() {
        return Err(BinFault::Script);
    }
    if let Some(Record { offset, bytes }) = record("byteorder") {
        let text = archive::read(file, offset, bytes.min(16))?;
        if text != b"little" {
            return Err(BinFault::ByteOrder { found: shown(&String::from_utf8_lossy(&text)) });
        }
    }
    let Record { offset, bytes } = record("data.pkl").ok_or(BinFault::NoStateDict)?;
    if bytes > MAX_PICKLE {
        return Err(BinFault::PickleSize { found: bytes });
    }
    let pickle = archive::read(file, offset, bytes)?;
    let mut tensors = BTreeMap::new();
    let mut storages: BTreeMap<&str, (DType, i64)> = BTreeMap::new();
    for pickled in state_dict(&pickle)? {
        let (name, tensor) = (pickled.name, shown(pickled.name));
        if let Some(reason) = bad_name(name) {
            return Err(HeaderFault::Name { tensor, reason }.into());
        }
        let found = (pickled.dtype, pickled.elements);
        let before = *storages.entry(pickled.key).or_insert(found);
        if before != found {
            let (record, found, before) = (data(pickled.key), storage(found), storage(before));
            return Err(BinFault::TwoTypes { tensor, record, found, before });
        }
        let located = locate(&pickled, record(&format!("data/{}", pickled.key)))?;
        if tensors.insert(name.to_owned(), located).is_some() {
            return Err(BinFault::Duplicate { tensor });
        }
    }
    if tensors.is_empty() {
        return Err(HeaderFault::NoTensors.into());
    }
    Ok(tensors)
}

/// The folder that all records of the zip lie in: it is named as the file was when it was written.
fn prefix(records: &BTreeMap<String, Record>) -> Result<&str, BinFault> {
    let prefixes = records.keys().filter_map(|name| name.strip_suffix("/data.pkl"));
    let prefixes: Vec<&str> = prefixes.filter(|prefix| !prefix.contains('/')).collect();
    match prefixes[..] {
        [prefix] => Ok(prefix),
        [] => Err(BinFault::NoStateDict),
        _ => Err(BinFault::StateDicts { found: prefixes.len() }),
    }
}

/// A storage's record, as messages show it.
fn data(key: &str) -> String {
    format!("data/{}", shown(key))
}

fn storage((dtype, elements): (DType, i64)) -> String {
    format!("{elements} x {dtype}")
}

fn locate(pickled: &Pickled<'_>, record: Option<Record>) -> Result<Located, BinFault> {
    let Pickled { dtype, elements, first, ref shape, ref stride, .. } = *pickled;
    let tensor = || shown(pickled.name);
    if shape.iter().chain(stride).chain([&first]).any(|value| *value < 0) {
        return Err(BinFault::Negative { tensor: tensor(), shape: shape.clone(), stride: stride.clone(), first });
    }
    let sizes: Vec<u64> = shape.iter().map(|size| size.unsigned_abs()).collect();
    if sizes.contains(&0) {
        return Err(HeaderFault::ZeroSize { tensor: tensor(), shape: sizes }.into());
    }
    let overflow = || HeaderFault::Overflow { tensor: tensor(), shape: sizes.clone() };
    let element = dtype.bits() as u64 / 8;
    let product = |count: u64, size: &u64| count.checked_mul(*size);
    let bytes = sizes.iter().try_fold(element, product).ok_or_else(overflow)?;
    let dimensions: Option<Vec<usize>> = sizes.iter().map(|size| usize::try_from(*size).ok()).collect();
    let dimensions = dimensions.ok_or_else(overflow)?;
    // Products of some of the sizes are no larger than that of all. A dimension of 1 is never stepped along.
    let wanted: Vec<u64> = (0..sizes.len()).map(|axis| sizes[axis + 1..].iter().product()).collect();
    let contiguous = |axis: usize| sizes[axis] == 1 || stride[axis].unsigned_abs() == wanted[axis];
    if stride.len() != sizes.len() || !(0..sizes.len()).all(contiguous) {
        return Err(BinFault::Strides { tensor: tensor(), shape: dimensions, found: stride.clone(), wanted });
    }
    let name = data(pickled.key);
    let Some(record) = record else { return Err(BinFault::NoRecord { tensor: tensor(), record: name }) };
    let held = u64::try_from(elements).ok().and_then(|elements| elements.checked_mul(element));
    if held != Some(record.bytes) {
        let wanted = storage((dtype, elements));
        return Err(BinFault::RecordSize { tensor: tensor(), record: name, found: record.bytes, wanted });
    }
    let start = first.unsigned_abs().checked_mul(element).ok_or_else(overflow)?;
    match start.checked_add(bytes).ok_or_else(overflow)? {
        // The record lies inside the file, so its places can be counted.
        end if end <= record.bytes => Ok(Located { dtype, shape: dimensions, offset: record.offset + start, bytes }),
        end => Err(BinFault::Past { tensor: tensor(), end: end / element, found: record.bytes / element }),
    }
}
