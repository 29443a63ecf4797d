//! Weight files: safetensors with every weight under its key and the scales of a quantized one under `KEY.scale`.
//! INT4 payloads are written as U8 of shape `[in, out / 2]`, since other readers know no type of half a byte.
use crate::check::stored_shapes;
use crate::{Pool, QuantError, Source, Stored, materialize_with, plain_entry, to_f32};
use graphs::interpret::Values;
use graphs::{DType, Format, Weight};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Where the data starts, and what it is a multiple of.
const ALIGNMENT: usize = 64;

/// Key under which the scales of a quantized weight are stored.
pub fn scale_key(key: &str) -> String {
    format!("{key}.scale")
}

/// One tensor of a weight file before it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub key: String,
    pub dtype: DType,
    /// As stored; `[in, out]` for INT4 too.
    pub shape: Vec<usize>,
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreSummary {
    pub bytes: u64,
    /// SHA-256 in hexadecimal.
    pub sha256: String,
    pub tensors: usize,
}

/// What a weight will take, from shapes alone: the weight, then its scales if it is quantized.
///
/// # Errors
/// A tensor that is missing or does not fit.
pub fn layout(weight: &Weight, source: &dyn Source, compute: DType) -> Result<Vec<Layout>, QuantError> {
    let (dtype, shape, scale) = stored_shapes(weight, source, compute)?;
    let entry = |key: String, dtype: DType, shape: Vec<usize>| {
        let bytes = dtype.bytes(shape.iter().product()) as u64;
        Layout { key, dtype, shape, bytes }
    };
    let key = weight.key();
    let scale = scale.map(|shape| entry(scale_key(&key), compute, shape));
    Ok(std::iter::once(entry(key, dtype, shape)).chain(scale).collect())
}

/// Writes the weights to a new file, one at a time, equal ones once. The bytes depend on nothing but the weights:
/// plain weights first, then quantized ones, wider types before narrower, equal types by key. `progress` is told the
/// bytes done and the bytes of all.
///
/// The data starts on a multiple of 64, and plain tensors lie on multiples of their element. Scales lie right before
/// their payload; they lie so too where all bytes before them are a multiple of their element, as for layers whose
/// sizes are multiples of 4.
///
/// # Errors
/// A weight that cannot be made, or a failing write.
pub fn store_weights<'w>(
    weights: impl Iterator<Item = &'w Weight>,
    source: &dyn Source,
    compute: DType,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<StoreSummary, QuantError> {
    let unique: BTreeMap<String, &Weight> = weights.map(|weight| (weight.key(), weight)).collect();
    // Data comes weight by weight, so a quantized weight and its scales lie together; those with scales come last, after
    // everything of a wider type than a byte.
    let mut planned: Vec<(&Weight, Vec<Layout>)> = Vec::new();
    for weight in unique.into_values() {
        planned.push((weight, layout(weight, source, compute)?));
    }
    planned.sort_by_key(|(weight, parts)| (weight.format().is_some(), std::cmp::Reverse(parts[0].dtype.bits())));
    write(&planned, "trtvlm", source, Some(compute), path, progress)
}

/// A plain weight with the name that it gets in a file.
pub struct Named {
    pub name: String,
    pub weight: Weight,
    /// Of a float weight what it is converted to, else what its bytes are called.
    pub dtype: DType,
}

/// Writes plain weights under names of their own to a new file, one at a time: wider types before narrower, equal types by
/// name. `progress` is told as by [`store_weights`].
///
/// # Errors
/// As [`store_weights`].
pub fn store_named(
    weights: &[Named],
    source: &dyn Source,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<StoreSummary, QuantError> {
    let mut planned: Vec<(&Weight, Vec<Layout>)> = Vec::new();
    for Named { name, weight, dtype } in weights {
        let shape = plain_entry(weight, source)?.shape;
        let bytes = dtype.bytes(shape.iter().product()) as u64;
        planned.push((weight, vec![Layout { key: name.clone(), dtype: *dtype, shape, bytes }]));
    }
    planned.sort_by(|(_, one), (_, other)| {
        let order = |parts: &[Layout]| (std::cmp::Reverse(parts[0].dtype.bits()), parts[0].key.clone());
        order(one).cmp(&order(other))
    });
    write(&planned, "pt", source, None, path, progress)
}

/// Writes the weights in their order, each made for `compute` or else in the type that its plan has.
fn write(
    planned: &[(&Weight, Vec<Layout>)],
    format: &str,
    source: &dyn Source,
    compute: Option<DType>,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<StoreSummary, QuantError> {
    let header = header(format, planned.iter().flat_map(|(_, parts)| in_file_order(parts)));
    let total: u64 = planned.iter().flat_map(|(_, parts)| parts).map(|part| part.bytes).sum();
    let mut out = HashingWriter { out: BufWriter::with_capacity(1 << 20, File::create(path)?), hash: Sha256::new() };
    out.write(&header)?;
    let (mut done, mut tensors) = (0, 0);
    let pool = Pool::default();
    for (weight, parts) in planned {
        let compute = compute.unwrap_or(parts[0].dtype);
        let stored = materialize_with(weight, source, compute, &pool)?;
        let scale = stored.scale.as_deref();
        let values = [scale.map(|scale| &scale.bytes[..]), Some(&stored.bytes[..])];
        let found: u64 = values.iter().flatten().map(|bytes| bytes.len() as u64).sum();
        let wanted: u64 = parts.iter().map(|part| part.bytes).sum();
        if found != wanted {
            let reason = format!("{found} bytes were made, {wanted} planned");
            return Err(QuantError::Expression { weight: weight.key(), reason });
        }
        values.into_iter().flatten().try_for_each(|bytes| out.write(bytes))?;
        tensors += parts.len();
        done += found;
        progress(done, total);
        pool.give(stored);
    }
    let HashingWriter { mut out, hash } = out;
    out.flush()?;
    let sha256 = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(StoreSummary { bytes: header.len() as u64 + total, sha256, tensors })
}

/// Scales first: their elements are the wider ones.
fn in_file_order(parts: &[Layout]) -> impl Iterator<Item = &Layout> {
    parts.iter().rev()
}

fn header<'l>(format: &str, parts: impl Iterator<Item = &'l Layout>) -> Vec<u8> {
    let mut entries = Map::from_iter([("__metadata__".to_owned(), json!({ "format": format }))]);
    let mut offset = 0;
    for part in parts {
        let (dtype, shape) = match (part.dtype, &part.shape[..]) {
            (DType::Int4, [rows, columns]) => (DType::Uint8, vec![*rows, columns / 2]),
            (dtype, shape) => (dtype, shape.to_vec()),
        };
        let end = offset + part.bytes;
        let entry = json!({ "dtype": dtype.safetensors(), "shape": shape, "data_offsets": [offset, end] });
        entries.insert(part.key.clone(), entry);
        offset = end;
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    while !(text.len() + 8).is_multiple_of(ALIGNMENT) {
        text.push(b' ');
    }
    [&(text.len() as u64).to_le_bytes(), &text[..]].concat()
}

struct HashingWriter {
    out: BufWriter<File>,
    hash: Sha256,
}

impl HashingWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.hash.update(bytes);
        self.out.write_all(bytes)
    }
}

#[derive(serde::Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// Where a tensor lies in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// From the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

/// An open safetensors file that trtvlm wrote, its header not looked into yet.
pub struct RawHeader {
    pub file: File,
    /// Of the file, in bytes.
    pub size: u64,
    /// JSON.
    pub text: Vec<u8>,
    /// Where the data starts.
    pub data: u64,
}

impl RawHeader {
    /// # Errors
    /// What is wrong with the file, in words.
    pub fn read(path: &Path) -> Result<RawHeader, String> {
        let io = |error: std::io::Error| error.to_string();
        let file = File::open(path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 0).map_err(io)?;
        let length = u64::from_le_bytes(length);
        if length > 100_000_000 || length + 8 > size {
            return Err(format!("a header of {length} bytes in a file of {size}"));
        }
        let mut text = vec![0; length as usize];
        file.read_exact_at(&mut text, 8).map_err(io)?;
        Ok(RawHeader { file, size, text, data: 8 + length })
    }
}

/// A file that [`store_weights`] wrote.
pub struct StoredWeights {
    path: PathBuf,
    file: File,
    places: HashMap<String, Place>,
}

impl StoredWeights {
    /// Reads the header.
    ///
    /// # Errors
    /// A file that is no such file.
    pub fn open(path: &Path) -> Result<StoredWeights, QuantError> {
        let refuse = |reason: String| QuantError::File { path: path.into(), reason };
        let RawHeader { file, size, text, data } = RawHeader::read(path).map_err(refuse)?;
        let entries: BTreeMap<String, Value> =
            serde_json::from_slice(&text).map_err(|error| refuse(format!("its header is no JSON: {error}")))?;
        let mut places = HashMap::new();
        for (key, entry) in entries.into_iter().filter(|(key, _)| key != "__metadata__") {
            let Entry { dtype, shape, data_offsets: [start, end] } =
                serde_json::from_value(entry).map_err(|error| refuse(format!("tensor `{key}`: {error}")))?;
            let dtype = DType::parse(&dtype).ok_or_else(|| refuse(format!("tensor `{key}` has type {dtype}")))?;
            let (offset, bytes) = (data.saturating_add(start), end.saturating_sub(start));
            let count = shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size));
            if count.map(|count| dtype.bytes(count) as u64) != Some(bytes) || offset.saturating_add(bytes) > size {
                return Err(refuse(format!("tensor `{key}` of {dtype}{shape:?} at {start}..{end} does not fit")));
            }
            places.insert(key, Place { dtype, shape, offset, bytes });
        }
        Ok(StoredWeights { path: path.into(), file, places })
    }

    /// Where a weight lies, and its scales if it is quantized.
    ///
    /// # Errors
    /// A weight that the file lacks or holds in another form.
    pub fn place_of(&self, weight: &Weight) -> Result<(Place, Option<Place>), QuantError> {
        let key = weight.key();
        let refuse = |reason: String| QuantError::File { path: self.path.clone(), reason };
        let find = |key: &str| self.places.get(key).cloned().ok_or_else(|| refuse(format!("has no tensor `{key}`")));
        let mut values = find(&key)?;
        let shape = weight.shape();
        let Some(format) = weight.format() else {
            if values.shape != shape {
                return Err(refuse(format!("tensor `{key}` is {}{:?}, wanted {shape:?}", values.dtype, values.shape)));
            }
            return Ok((values, None));
        };
        if let (Format::Int4 { .. }, [_, columns]) = (format, &mut values.shape[..]) {
            values.dtype = DType::Int4;
            *columns *= 2;
        }
        let scale = find(&scale_key(&key))?;
        let fits = match shape[..] {
            [out, input] => values.shape == [input, out] && scale.shape == format.scale_shape(out, input),
            _ => false,
        };
        if !fits || values.dtype != format.dtype() {
            let reason = format!("tensor `{key}` is {}{:?}, wanted {format} of {shape:?}", values.dtype, values.shape);
            return Err(refuse(reason));
        }
        Ok((values, Some(scale)))
    }

    fn read(&self, place: &Place) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; place.bytes as usize];
        self.file.read_exact_at(&mut bytes, place.offset)?;
        Ok(bytes)
    }
}

impl Values for StoredWeights {
    fn values(&self, weight: &Weight) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
        let (values, scale) = self.place_of(weight)?;
        let bytes = self.read(&values)?;
        let Some(scale) = scale else { return Ok(to_f32(values.dtype, &bytes)) };
        let stored =
            |place: &Place, bytes, scale| Stored { dtype: place.dtype, shape: place.shape.clone(), bytes, scale };
        let scale = stored(&scale, self.read(&scale)?, None);
        Ok(stored(&values, bytes, Some(Box::new(scale))).to_f32())
    }
}
