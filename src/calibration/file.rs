//! The file of statistics: safetensors with, for each distinct input `NETWORK/PATH` of linear layers, `.absmax`, `.sum`
//! (of magnitudes) and `.rows`, and `.lots` by which rows were chosen; what it is of lies in its metadata.
use graphs::DType;
use quant::{Gathered, InputStatistics, RawHeader};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, View};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

#[derive(Debug, Error)]
pub enum StatisticsError {
    #[error("statistics file `{}`: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error("statistics `{}` are of another model", path.display())]
    OtherModel { path: PathBuf },
    #[error("statistics `{}` are of {found} networks, these are {wanted}", path.display())]
    OtherType { path: PathBuf, found: DType, wanted: DType },
    #[error("statistics `{}` lack `{input}`", path.display())]
    Lacks { path: PathBuf, input: String },
    #[error("the quantization asked for needs statistics of the layers' inputs")]
    NoStatistics,
}

impl StatisticsError {
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            StatisticsError::NoStatistics => "gather them with `trtvlm calibrate MODEL --data FILE -o \
                 STATS.safetensors`, then give `--calibration STATS.safetensors`"
                .into(),
            StatisticsError::Lacks { .. } => {
                "calibrate again, with pictures where the vision network is quantized".into()
            }
            StatisticsError::OtherModel { .. } => "calibrate this model with `trtvlm calibrate`".into(),
            StatisticsError::OtherType { wanted, .. } => format!("calibrate again with `--dtype {wanted}`"),
            StatisticsError::File { .. } => return None,
        })
    }
}

/// What a file of statistics says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Of the model, see [`super::fingerprint`].
    pub model: String,
    /// SHA-256 of the samples as token ids and pixels.
    pub data: String,
    pub dtype: DType,
    pub samples: usize,
    /// Samples that are in it already; a finished file has all.
    pub done: usize,
    /// Rows kept of each input.
    pub rows: usize,
    /// Rows seen of each input.
    pub counts: BTreeMap<String, u64>,
}

const HEADER: &str = "trtvlm";

/// An open file; values are read when they are asked for.
pub struct Statistics {
    path: PathBuf,
    file: File,
    pub header: Header,
    /// Shape and place of each tensor.
    places: HashMap<String, (Dtype, Vec<usize>, u64, usize)>,
}

impl Statistics {
    /// # Errors
    /// A file that is no such file.
    pub fn open(path: &Path) -> Result<Statistics, StatisticsError> {
        let refuse = |reason: String| StatisticsError::File { path: path.into(), reason };
        let RawHeader { file, size, text, data } = RawHeader::read(path).map_err(refuse)?;
        let metadata: Metadata = serde_json::from_slice(&text).map_err(|error| refuse(error.to_string()))?;
        let text = metadata.metadata().as_ref().and_then(|metadata| metadata.get(HEADER));
        let text = text.ok_or_else(|| refuse("it holds no statistics".into()))?;
        let header = serde_json::from_str(text).map_err(|error| refuse(format!("its metadata: {error}")))?;
        let mut places = HashMap::new();
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let offset = data + start as u64;
            if data + end as u64 > size {
                return Err(refuse("it is cut off".into()));
            }
            places.insert(name, (info.dtype, info.shape.clone(), offset, end - start));
        }
        Ok(Statistics { path: path.into(), file, header, places })
    }

    /// Refuses those of another model, of another type, and unfinished ones.
    ///
    /// # Errors
    /// As said.
    pub fn check(&self, model: &str, dtype: DType) -> Result<(), StatisticsError> {
        let path = self.path.clone();
        if self.header.model != model {
            return Err(StatisticsError::OtherModel { path });
        }
        if self.header.dtype != dtype {
            return Err(StatisticsError::OtherType { path, found: self.header.dtype, wanted: dtype });
        }
        if self.header.done < self.header.samples {
            let reason = format!("{} of {} samples are in it", self.header.done, self.header.samples);
            return Err(StatisticsError::File { path, reason });
        }
        Ok(())
    }

    pub fn has(&self, input: &str) -> bool {
        self.header.counts.contains_key(input)
    }

    /// # Errors
    /// An input that was not seen.
    pub fn of(&self, input: &str) -> Result<InputStatistics, StatisticsError> {
        Ok(self.gathered(input)?.finish())
    }

    /// What an unfinished run goes on from.
    ///
    /// # Errors
    /// A file whose parts do not fit.
    pub fn gathered(&self, input: &str) -> Result<Gathered, StatisticsError> {
        let lacks = || StatisticsError::Lacks { path: self.path.clone(), input: input.into() };
        let count = *self.header.counts.get(input).ok_or_else(lacks)?;
        let absmax = self.read::<4>(input, "absmax", Dtype::F32)?.into_iter().map(f32::from_le_bytes).collect();
        let sum: Vec<f64> = self.read::<8>(input, "sum", Dtype::F64)?.into_iter().map(f64::from_le_bytes).collect();
        let rows: Vec<f32> = self.read::<4>(input, "rows", Dtype::F32)?.into_iter().map(f32::from_le_bytes).collect();
        let lots = self.read::<8>(input, "lots", Dtype::U64)?.into_iter().map(u64::from_le_bytes);
        let gathered = Gathered { absmax, count, rows: lots.zip(chunks(&rows, sum.len())).collect(), sum };
        match gathered.absmax.len() == gathered.sum.len() {
            true => Ok(gathered),
            false => Err(StatisticsError::File { path: self.path.clone(), reason: format!("`{input}` does not fit") }),
        }
    }

    fn read<const N: usize>(&self, input: &str, part: &str, dtype: Dtype) -> Result<Vec<[u8; N]>, StatisticsError> {
        let refuse = |reason: String| StatisticsError::File { path: self.path.clone(), reason };
        let name = format!("{input}.{part}");
        let place = self.places.get(&name).filter(|place| place.0 == dtype);
        let (_, _, offset, bytes) = place.ok_or_else(|| refuse(format!("it has no `{name}` of {dtype:?}")))?;
        let mut buffer = vec![0; *bytes];
        self.file.read_exact_at(&mut buffer, *offset).map_err(|error| refuse(error.to_string()))?;
        Ok(buffer.as_chunks::<N>().0.to_vec())
    }
}

fn chunks(rows: &[f32], width: usize) -> impl Iterator<Item = Vec<f32>> {
    rows.chunks_exact(width.max(1)).map(<[f32]>::to_vec)
}

#[derive(Clone, Copy)]
enum Part {
    Absmax,
    Sum,
    Rows,
    Lots,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Part::Absmax => "absmax",
            Part::Sum => "sum",
            Part::Rows => "rows",
            Part::Lots => "lots",
        }
    }
}

/// A tensor whose bytes are made when it is written, so that memory holds one more tensor than the statistics.
struct Stored<'g> {
    kind: Part,
    gathered: &'g Gathered,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let Gathered { absmax, sum, rows, .. } = self.gathered;
        let bytes = match self.kind {
            Part::Absmax => absmax.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Part::Sum => sum.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Part::Rows => rows.values().flatten().flat_map(|value| value.to_le_bytes()).collect(),
            Part::Lots => rows.keys().flat_map(|lot| lot.to_le_bytes()).collect(),
        };
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Writes a file beside `path` and puts it in its place.
///
/// # Errors
/// A failing write.
pub(super) fn write(path: &Path, header: &Header, inputs: &BTreeMap<String, Gathered>) -> Result<(), StatisticsError> {
    let refuse = |reason: String| StatisticsError::File { path: path.into(), reason };
    let mut parts = Vec::new();
    for (input, gathered) in inputs {
        let (rows, width) = (gathered.rows.len(), gathered.width());
        for (kind, dtype, shape) in [
            (Part::Absmax, Dtype::F32, vec![width]),
            (Part::Sum, Dtype::F64, vec![width]),
            (Part::Rows, Dtype::F32, vec![rows, width]),
            (Part::Lots, Dtype::U64, vec![rows]),
        ] {
            parts.push((format!("{input}.{}", kind.name()), Stored { kind, gathered, dtype, shape }));
        }
    }
    let text = serde_json::to_string(header).map_err(|error| refuse(error.to_string()))?;
    let metadata = Some(HashMap::from([(HEADER.to_owned(), text)]));
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    safetensors::serialize_to_file(parts, metadata, Path::new(&new)).map_err(|error| refuse(error.to_string()))?;
    std::fs::rename(&new, path).map_err(|error| refuse(error.to_string()))
}
