//! The weight files: shards laid out first, then filled block by block by all threads at once.
use super::SynthError;
use super::draw::{Distribution, Generator};
use bytemuck::Pod;
use graphs::{DType, Network};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// As large as a shard may be, where no single tensor is larger; Hugging Face's own limit.
const SHARD_BYTES: u64 = 5_000_000_000;
/// Values that one thread draws and writes in one go.
const BLOCK: usize = 1 << 18;
/// Values drawn in one go, few enough to stay in the cache until they are converted.
const RUN: usize = 1 << 12;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tensor {
    name: String,
    shape: Vec<usize>,
    distribution: Distribution,
}

impl Tensor {
    fn count(&self) -> usize {
        self.shape.iter().product()
    }
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Paths in the folder, in order.
    pub files: Vec<String>,
    pub tensors: usize,
    pub values: u64,
    /// Of the weights, without headers.
    pub bytes: u64,
}

/// Every tensor that the networks read, once, in the order of its first use, which also decides its distribution.
pub(super) fn tensors(networks: &[Network]) -> Vec<Tensor> {
    let mut seen = HashSet::new();
    let mut list = Vec::new();
    for (node, weight) in networks.iter().flat_map(Network::weights) {
        let distribution = Distribution::of(node, weight);
        for (name, shape) in weight.tensors() {
            if seen.insert(name) {
                list.push(Tensor { name: name.to_owned(), shape: shape.to_vec(), distribution });
            }
        }
    }
    list
}

/// The tensors of each part (a key of the config and a folder), without the folder in their names; all of them for the
/// checkpoint's own folder, named by the empty text, where there are no parts.
pub(super) fn groups<'p>(tensors: Vec<Tensor>, parts: &[(&str, &'p str)]) -> Vec<(&'p str, Vec<Tensor>)> {
    if parts.is_empty() {
        return vec![("", tensors)];
    }
    let named = |tensor: &Tensor, part: &str| {
        let name = tensor.name.strip_prefix(part)?.strip_prefix('.')?;
        Some(Tensor { name: name.to_owned(), ..tensor.clone() })
    };
    let group =
        |&(_, part): &(&str, &'p str)| (part, tensors.iter().filter_map(|tensor| named(tensor, part)).collect());
    parts.iter().map(group).collect()
}

pub(super) fn bytes(tensors: &[Tensor], dtype: DType) -> u64 {
    tensors.iter().map(|tensor| dtype.bytes(tensor.count()) as u64).sum()
}

struct Shard<'t> {
    name: String,
    tensors: &'t [Tensor],
    bytes: u64,
}

/// A run of values of one tensor, and where it goes.
struct Job<'t> {
    file: &'t File,
    path: &'t Path,
    generator: Generator,
    first: usize,
    count: usize,
    offset: u64,
}

pub(super) fn write(
    tensors: &[Tensor],
    dtype: DType,
    seed: u64,
    folder: &Path,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Summary, SynthError> {
    let shards = deal(tensors, dtype, SHARD_BYTES);
    let total = shards.iter().map(|shard| shard.bytes).sum();
    let mut opened = Vec::new();
    for shard in &shards {
        let path = folder.join(&shard.name);
        let header = header(shard.tensors, dtype);
        let create = || {
            let file = File::create_new(&path)?;
            file.set_len(header.len() as u64 + shard.bytes)?;
            file.write_all_at(&header, 0)?;
            Ok(file)
        };
        let file = create().map_err(SynthError::writing(&path))?;
        opened.push((file, path, header.len() as u64));
    }
    let mut jobs = Vec::new();
    for (shard, (file, path, start)) in std::iter::zip(&shards, &opened) {
        let mut offset = *start;
        for tensor in shard.tensors {
            let generator = Generator::new(seed, &tensor.name, tensor.distribution);
            for first in (0..tensor.count()).step_by(BLOCK) {
                let count = BLOCK.min(tensor.count() - first);
                jobs.push(Job { file, path, generator, first, count, offset });
                offset += dtype.bytes(count) as u64;
            }
        }
    }
    let progress = |done| progress(done, total);
    match dtype {
        DType::Float32 => fill::<f32>(&jobs, &progress, |into, values| into.copy_from_slice(values)),
        DType::Float16 => fill::<f16>(&jobs, &progress, |into, values| into.convert_from_f32_slice(values)),
        DType::Bfloat16 => fill::<bf16>(&jobs, &progress, |into, values| into.convert_from_f32_slice(values)),
        other => Err(SynthError::DType(other)),
    }?;
    let mut files: Vec<String> = shards.iter().map(|shard| shard.name.clone()).collect();
    if shards.len() > 1 {
        let name = "model.safetensors.index.json";
        let path = folder.join(name);
        std::fs::write(&path, format!("{:#}\n", index(&shards, total))).map_err(SynthError::writing(&path))?;
        files.push(name.to_owned());
    }
    let values = tensors.iter().map(|tensor| tensor.count() as u64).sum();
    Ok(Summary { files, tensors: tensors.len(), values, bytes: total })
}

fn fill<T: Pod + Send>(
    jobs: &[Job<'_>],
    progress: &(dyn Fn(u64) + Sync),
    convert: impl Fn(&mut [T], &[f32]) + Sync,
) -> Result<(), SynthError> {
    let done = AtomicU64::new(0);
    let buffers = || (vec![T::zeroed(); BLOCK], vec![0f32; RUN]);
    jobs.par_iter().try_for_each_init(buffers, |(block, run), job| {
        let block = &mut block[..job.count];
        for (number, into) in block.chunks_mut(RUN).enumerate() {
            let values = &mut run[..into.len()];
            job.generator.fill((job.first + number * RUN) as u64, values);
            convert(into, values);
        }
        let bytes: &[u8] = bytemuck::cast_slice(block);
        job.file.write_all_at(bytes, job.offset).map_err(SynthError::writing(job.path))?;
        progress(done.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64);
        Ok(())
    })
}

/// Deals the tensors out in their order.
fn deal(tensors: &[Tensor], dtype: DType, limit: u64) -> Vec<Shard<'_>> {
    let mut shards: Vec<(usize, usize, u64)> = Vec::new();
    for (place, tensor) in tensors.iter().enumerate() {
        let bytes = dtype.bytes(tensor.count()) as u64;
        match shards.last_mut() {
            Some((_, end, filled)) if *filled + bytes <= limit => (*end, *filled) = (place + 1, *filled + bytes),
            _ => shards.push((place, place + 1, bytes)),
        }
    }
    let count = shards.len();
    let name = |number: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
    };
    let shard = |(number, (start, end, bytes))| Shard { name: name(number), tensors: &tensors[start..end], bytes };
    shards.into_iter().enumerate().map(shard).collect()
}

/// `format: pt` is what transformers looks for before it reads a file.
fn header(tensors: &[Tensor], dtype: DType) -> Vec<u8> {
    let mut entries = Map::from_iter([("__metadata__".to_owned(), json!({ "format": "pt" }))]);
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + dtype.bytes(tensor.count());
        let entry = json!({ "dtype": dtype.safetensors(), "shape": tensor.shape, "data_offsets": [offset, end] });
        entries.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    // Readers map the file: its data starts on a multiple of a cache line.
    while !(text.len() + 8).is_multiple_of(64) {
        text.push(b' ');
    }
    [&(text.len() as u64).to_le_bytes(), &text[..]].concat()
}

fn index(shards: &[Shard<'_>], total: u64) -> Value {
    let place = |shard: &Shard<'_>| {
        let file = json!(shard.name);
        shard.tensors.iter().map(|tensor| (tensor.name.clone(), file.clone())).collect::<Vec<_>>()
    };
    let mut places: Vec<(String, Value)> = shards.iter().flat_map(place).collect();
    places.sort_by(|left, right| left.0.cmp(&right.0));
    json!({ "metadata": { "total_size": total }, "weight_map": Map::from_iter(places) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_keep_order_and_limit() {
        let tensor = |name: &str, size| Tensor {
            name: name.into(),
            shape: vec![size, 5],
            distribution: Distribution { mean: 0.0, deviation: 1.0 },
        };
        let tensors = [tensor("b", 2), tensor("a", 3), tensor("huge", 40), tensor("c", 1)];
        let shards = deal(&tensors, DType::Float16, 50);
        let found: Vec<_> =
            shards.iter().map(|shard| (shard.name.as_str(), shard.tensors.len(), shard.bytes)).collect();
        let wanted = [
            ("model-00001-of-00003.safetensors", 2, 50),
            ("model-00002-of-00003.safetensors", 1, 400),
            ("model-00003-of-00003.safetensors", 1, 10),
        ];
        assert_eq!(found, wanted);
        let index = index(&shards, 460);
        assert_eq!(index["metadata"]["total_size"], 460);
        assert_eq!(index["weight_map"]["a"], "model-00001-of-00003.safetensors");
        assert_eq!(deal(&tensors, DType::Float16, 460)[0].name, "model.safetensors");
    }
}
