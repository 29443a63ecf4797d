//! TensorRT 10 engines on a CUDA GPU. The caches stay on the device and are changed in place; a decode step is a recorded
//! graph that picks its own next token, so that the host only reads tokens, several steps at a time.
mod loaded;

use super::{Executor, Output, RuntimeError, check_prompts};
use crate::assemble::engine_name;
use crate::backend::{self, Kind};
use crate::device::{Buffer, Device, Gpu};
use crate::engine_dir::{EngineConfig, EngineDirectory, Manifest};
use crate::lower::{NEXT_LENGTHS, NEXT_TOKENS};
use crate::plugins;
use cudarc::driver::CudaGraph;
use loaded::Loaded;
use std::collections::BTreeMap;
use tensorrt_sys as trt;

/// Optimization profiles of a language engine.
const PREFILL: usize = 0;
const DECODE: usize = 1;

/// Decode steps between two looks at their tokens.
const STRIDE: usize = 8;

const INT: usize = size_of::<i32>();

pub struct Tensorrt {
    graph: Option<CudaGraph>,
    vision: Option<Loaded>,
    language: Loaded,
    device: Device,
    config: EngineConfig,
    /// Tokens of each request that lie in the caches.
    lengths: Vec<usize>,
    /// Tokens of the steps since the host last looked, int32 `[STRIDE, batch]`.
    history: Buffer,
    /// The engine and profile that ran last.
    last: Last,
}

/// What can be measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Vision,
    Prefill,
}

#[derive(Clone, Copy, PartialEq)]
enum Last {
    Nothing,
    Vision,
    Language(usize),
}

impl Tensorrt {
    /// Loads the engines of a directory.
    ///
    /// # Errors
    /// Engines of another version or for another GPU, before anything is loaded; files that are missing or changed.
    pub fn open(directory: &EngineDirectory) -> Result<Tensorrt, RuntimeError> {
        let (library, device) = ready(directory)?;
        let load = |network: &str| -> Result<Loaded, RuntimeError> {
            Loaded::open(&device, library, &directory.file(&engine_name(network))?)
        };
        let vision = directory.manifest.networks.iter().any(|name| name == "vision");
        let vision = if vision { Some(load("vision")?) } else { None };
        let (language, config) = (load("language")?, directory.config(directory.language())?);
        // Every new token's position is the number of tokens before it.
        language.bind(&device, DECODE, "position_ids", "past_lengths")?;
        let history = device.allocate(STRIDE * config.build_config.max_batch_size * INT)?;
        Ok(Tensorrt {
            graph: None,
            vision,
            language,
            device,
            config,
            lengths: Vec::new(),
            history,
            last: Last::Nothing,
        })
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Decode steps, put on the stream: the first of a batch is run as it is, and the others are replays of its recording.
    pub fn decode_steps(&mut self, count: usize) -> Result<(), RuntimeError> {
        let bytes = self.lengths.len() * INT;
        for place in 0..count {
            match self.graph.take() {
                Some(graph) => {
                    self.device.replay(&graph)?;
                    self.graph = Some(graph);
                }
                None => {
                    step(&self.device, &mut self.language, bytes)?;
                    self.device.wait()?;
                    let (device, language) = (&self.device, &mut self.language);
                    self.graph = Some(device.record(|| step(device, language, bytes))?);
                }
            }
            let tokens = self.language.buffer(NEXT_TOKENS)?;
            self.device.copy(tokens, &mut self.history, place % STRIDE * bytes, bytes)?;
        }
        self.lengths.iter_mut().for_each(|length| *length += count);
        self.last = Last::Language(DECODE);
        Ok(())
    }

    /// Records one run of an engine with the inputs that it has, for measuring it.
    ///
    /// # Errors
    /// A directory without that engine.
    pub fn record(&self, work: Work) -> Result<CudaGraph, RuntimeError> {
        let (engine, profile) = match work {
            Work::Vision => (self.vision.as_ref().ok_or(RuntimeError::NoVision)?, 0),
            Work::Prefill => (&self.language, PREFILL),
        };
        self.device.wait()?;
        self.device.record(|| engine.enqueue(&self.device, profile))
    }

    fn tokens(&self, buffer: &Buffer, steps: usize) -> Result<Vec<Vec<u32>>, RuntimeError> {
        let batch = self.lengths.len();
        let bytes = self.device.download(buffer, steps * batch * INT)?;
        let tokens: Vec<u32> = bytes.as_chunks::<INT>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        Ok(tokens.chunks(batch.max(1)).map(<[u32]>::to_vec).collect())
    }

    /// The prompt in the caches and the first new tokens, put on the stream.
    pub fn prefill_start(&mut self, prompts: &[Vec<i32>]) -> Result<(), RuntimeError> {
        check_prompts(&self.config.build_config, prompts)?;
        let batch = prompts.len();
        let tokens = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let padded = |prompt: &Vec<i32>| {
            prompt.iter().copied().chain(std::iter::repeat_n(0, tokens - prompt.len())).collect::<Vec<_>>()
        };
        let ids: Vec<i32> = prompts.iter().flat_map(padded).collect();
        let positions: Vec<i32> = (0..batch).flat_map(|_| 0..tokens as i32).collect();
        let used: Vec<i32> = prompts.iter().map(|prompt| prompt.len() as i32).collect();
        let last: Vec<i32> = used.iter().map(|used| used - 1).collect();
        let (device, language) = (&self.device, &mut self.language);
        language.set_ints(device, PREFILL, "input_ids", &[batch, tokens], &ids)?;
        language.set_ints(device, PREFILL, "position_ids", &[batch, tokens], &positions)?;
        language.set_ints(device, PREFILL, "past_lengths", &[batch], &vec![0; batch])?;
        language.set_ints(device, PREFILL, "sequence_lengths", &[batch], &used)?;
        language.set_ints(device, PREFILL, "last_token_ids", &[batch], &last)?;
        let rows = self.config.build_config.max_prompt_embedding_table_size.max(1);
        let hidden = self.config.pretrained_config.hidden_size;
        language.set_shape(PREFILL, "prompt_embedding_table", &[rows, hidden])?;
        language.set_cache_batch(PREFILL, batch)?;
        language.enqueue(device, PREFILL)?;
        // What comes after has one token a request, the last of one.
        language.set_ints(device, DECODE, "last_token_ids", &[batch], &vec![0; batch])?;
        language.set_shape(DECODE, "input_ids", &[batch, 1])?;
        language.set_shape(DECODE, "position_ids", &[batch, 1])?;
        language.set_shape(DECODE, "past_lengths", &[batch])?;
        language.set_shape(DECODE, "sequence_lengths", &[batch])?;
        language.set_shape(DECODE, "prompt_embedding_table", &[1, hidden])?;
        language.set_cache_batch(DECODE, batch)?;
        if self.lengths.len() != batch {
            self.graph = None;
        }
        self.lengths = prompts.iter().map(Vec::len).collect();
        self.last = Last::Language(PREFILL);
        advance(&self.device, &mut self.language, batch * INT)
    }
}

/// The library and the GPU for a directory's engines, once it is known that they fit.
fn ready(directory: &EngineDirectory) -> Result<(&'static trt::Library, Device), RuntimeError> {
    let library = trt::Library::open(&backend::find(Kind::Tensorrt)?)?;
    let device = Device::open()?;
    check_target(&directory.manifest, &library.name(), &device.gpu()?)?;
    plugins::register(library)?;
    Ok((library, device))
}

/// TensorRT's own description, JSON, of the layers of each of a directory's engines.
///
/// # Errors
/// As [`Tensorrt::open`].
pub fn layers(directory: &EngineDirectory) -> Result<Vec<(String, String)>, RuntimeError> {
    let (library, _device) = ready(directory)?;
    let describe = |network: &String| {
        let plan = trt::MappedFile::open(&directory.file(&engine_name(network))?)?;
        Ok((network.clone(), trt::Engine::load(library, plan.bytes())?.describe()?))
    };
    directory.manifest.networks.iter().map(describe).collect()
}

/// One decode step, put on the stream.
fn step(device: &Device, language: &mut Loaded, bytes: usize) -> Result<(), RuntimeError> {
    language.enqueue(device, DECODE)?;
    advance(device, language, bytes)
}

/// Puts the next inputs, `bytes` each, in place of the last ones: tokens, rows of the caches before and after.
fn advance(device: &Device, language: &mut Loaded, bytes: usize) -> Result<(), RuntimeError> {
    language.copy(device, NEXT_TOKENS, "input_ids", bytes)?;
    language.copy(device, "sequence_lengths", "past_lengths", bytes)?;
    language.copy(device, NEXT_LENGTHS, "sequence_lengths", bytes)
}

/// Refuses engines that this library or GPU cannot run, by what the manifest says of them.
fn check_target(manifest: &Manifest, library: &str, gpu: &Gpu) -> Result<(), RuntimeError> {
    let entry = manifest.targets.get("tensorrt").cloned().unwrap_or_default();
    let (here, command) = (format!("sm{}", gpu.capability), manifest.command.clone());
    match entry.library {
        Some(built) if built != library => {
            return Err(RuntimeError::OtherVersion { built, here: library.to_owned(), command });
        }
        _ => {}
    }
    if !entry.gpus.contains(&here) {
        let built = format!("{} ({})", entry.gpus.join(", "), entry.built_on.unwrap_or_default());
        return Err(RuntimeError::OtherGpu { built, here: format!("{here} ({})", gpu.name), command });
    }
    Ok(())
}

impl Executor for Tensorrt {
    fn see(&mut self, pixels: &[f32], count: usize) -> Result<(), RuntimeError> {
        let vision = self.vision.as_mut().ok_or(RuntimeError::NoVision)?;
        let features = self.config.check_pictures(count)?;
        let [height, width] = self.config.pretrained_config.multimodal.map_or([0, 0], |found| found.image_size);
        let each = pixels.len() / count.max(1);
        let channels = each / (height * width).max(1);
        let row = self.config.pretrained_config.dtype.bytes(features * self.config.pretrained_config.hidden_size);
        let at_once = self.config.build_config.max_batch_size.max(1);
        for (chunk, pixels) in pixels.chunks((at_once * each).max(1)).enumerate() {
            let pictures = pixels.len() / each.max(1);
            vision.set_floats(&self.device, 0, "input", &[pictures, channels, height, width], pixels)?;
            vision.enqueue(&self.device, 0)?;
            let (from, to) = (vision.buffer("output")?, self.language.buffer_mut("prompt_embedding_table")?);
            self.device.copy(from, to, chunk * at_once * row, pictures * row)?;
        }
        self.last = Last::Vision;
        Ok(())
    }

    fn prefill(&mut self, prompts: &[Vec<i32>]) -> Result<Vec<u32>, RuntimeError> {
        self.prefill_start(prompts)?;
        let tokens = self.tokens(self.language.buffer(NEXT_TOKENS)?, 1)?;
        Ok(tokens.into_iter().next().unwrap_or_default())
    }

    fn decode(&mut self, limit: usize) -> Result<Vec<Vec<u32>>, RuntimeError> {
        let room = self.config.room(self.lengths.iter().copied())?;
        let steps = limit.min(STRIDE).min(room).max(1);
        self.decode_steps(steps)?;
        self.tokens(&self.history, steps)
    }

    fn force(&mut self, tokens: &[u32]) -> Result<(), RuntimeError> {
        Ok(self.device.upload(bytemuck::cast_slice(tokens), self.language.buffer_mut("input_ids")?)?)
    }

    fn outputs(&mut self) -> Result<BTreeMap<String, Output>, RuntimeError> {
        let (engine, profile) = match (self.last, &self.vision) {
            (Last::Language(profile), _) => (&self.language, profile),
            (Last::Vision, Some(vision)) => (vision, 0),
            _ => return Ok(BTreeMap::new()),
        };
        let output = |name: String| {
            let (shape, values) = engine.floats(&self.device, profile, &name)?;
            Ok((name, Output { shape, values }))
        };
        engine.results().into_iter().map(output).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn other_versions_and_gpus_are_refused_with_the_command() {
        let manifest: Manifest = serde_json::from_value(json!({
            "schema": 1, "version": "0", "model": "m", "model_type": "llama", "dtype": "float16", "quantization": {},
            "tp": 1, "networks": [], "files": {}, "command": "trtvlm build m -o DIR", "built_at": "",
            "targets": { "tensorrt": {
                "library": "TensorRT 10.6.0.26", "gpus": ["sm90"], "built_on": "NVIDIA H100 80GB HBM3",
            } },
        }))
        .unwrap();
        let gpu = |name: &str, capability| Gpu { name: name.into(), capability };
        let check = |library: &str, gpu: &Gpu| check_target(&manifest, library, gpu);
        // The H200 is of the same kind.
        assert!(check("TensorRT 10.6.0.26", &gpu("NVIDIA H200", 90)).is_ok());
        let error = check("TensorRT 10.7.0.23", &gpu("NVIDIA H100 80GB HBM3", 90)).unwrap_err();
        let wanted = "the engines were built by TensorRT 10.6.0.26; the library here is TensorRT 10.7.0.23";
        assert_eq!(error.to_string(), wanted);
        assert_eq!(error.hint().unwrap(), "build them again here: `trtvlm build m -o DIR`");
        let error = check("TensorRT 10.6.0.26", &gpu("NVIDIA A100", 80)).unwrap_err();
        let wanted = "the engines were built for sm90 (NVIDIA H100 80GB HBM3); the GPU here is sm80 (NVIDIA A100)";
        assert_eq!(error.to_string(), wanted);
    }
}
