//! TensorRT 10 engines on a CUDA GPU. The caches stay on the device and are changed in place; a decode step is a recorded
//! graph that picks its own next token, so that the host only reads tokens, several steps at a time.
mod decoder;
mod loaded;
mod source;

use super::{Executor, Output, RuntimeError, check_prompts};
use crate::assemble::engine_name;
use crate::backend::{self, Kind};
use crate::device::{Device, Gpu};
use crate::engine_dir::{EngineConfig, EngineDirectory, Manifest};
use crate::plugins::{self, Communicator};
use cudarc::driver::CudaGraph;
use decoder::{Decoder, PREFILL, STRIDE};
use loaded::Loaded;
use source::Source;
use std::collections::BTreeMap;
use std::sync::Arc;
use tensorrt_sys as trt;

const INT: usize = size_of::<i32>();

pub struct Tensorrt {
    /// Goes before what it reads of.
    decoder: Decoder,
    /// What reads prompts or pictures for a decoder that does not read them itself.
    source: Option<Source>,
    vision: Option<Loaded>,
    /// The way to the other ranks of a divided model.
    communicator: Option<Arc<Communicator>>,
    device: Device,
    config: EngineConfig,
    /// What ran last.
    last: Last,
}

/// Prompts made alike in length, `[batch, tokens]`, with padding on the right; `used` tokens of each count.
struct Padded {
    batch: usize,
    tokens: usize,
    ids: Vec<i32>,
    used: Vec<i32>,
}

impl Padded {
    fn new(prompts: &[Vec<i32>]) -> Padded {
        let tokens = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let padded = |prompt: &Vec<i32>| {
            prompt.iter().copied().chain(std::iter::repeat_n(0, tokens - prompt.len())).collect::<Vec<_>>()
        };
        let ids = prompts.iter().flat_map(padded).collect();
        Padded { batch: prompts.len(), tokens, ids, used: prompts.iter().map(|prompt| prompt.len() as i32).collect() }
    }
}

/// What can be measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Vision,
    /// What reads the prompts: a decoder alone, or an encoder with what makes keys and values of its output.
    Prefill,
}

#[derive(Clone, Copy, PartialEq)]
enum Last {
    Nothing,
    Vision,
    Prefill,
    Decode,
}

impl Tensorrt {
    /// Loads the engines of a directory.
    ///
    /// # Errors
    /// Engines of another version or for another GPU, before anything is loaded; files that are missing or changed.
    pub fn open(directory: &EngineDirectory) -> Result<Tensorrt, RuntimeError> {
        Tensorrt::open_rank(directory, 0, Device::open()?, None)
    }

    /// Loads the engines of one rank; of all calls on it, every rank must make the same.
    ///
    /// # Errors
    /// As [`Tensorrt::open`].
    pub fn open_rank(
        directory: &EngineDirectory,
        rank: usize,
        device: Device,
        communicator: Option<Arc<Communicator>>,
    ) -> Result<Tensorrt, RuntimeError> {
        device.enter()?;
        let library = ready(directory, &device)?;
        let load = |network: &str, lender: Option<&Loaded>| -> Result<Loaded, RuntimeError> {
            let path = directory.file(&engine_name(network, rank))?;
            Loaded::open(&device, library, &path, lender, communicator.as_ref())
        };
        let has = |network: &str| directory.manifest.networks.iter().any(|name| name == network);
        let load_if = |network: &str| if has(network) { load(network, None).map(Some) } else { Ok(None) };
        let config = directory.config(directory.language())?;
        let (vision, encoder) = (load_if("vision")?, load_if("encoder")?);
        let source = match has("cross") {
            true => {
                let cross = load("cross", encoder.as_ref())?;
                Some(Source::new(encoder, cross, &config)?)
            }
            false => None,
        };
        let language = load(directory.language(), source.as_ref().map(|source| &source.cross))?;
        let decoder = Decoder::new(&device, language, &config)?;
        Ok(Tensorrt { decoder, source, vision, communicator, device, config, last: Last::Nothing })
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Decode steps, put on the stream.
    pub fn decode_steps(&mut self, count: usize) -> Result<(), RuntimeError> {
        self.decoder.steps(&self.device, count, self.communicator.as_deref())?;
        self.last = Last::Decode;
        Ok(())
    }

    /// Records one run of an engine with the inputs that it has, for measuring it.
    ///
    /// # Errors
    /// A directory without that engine.
    pub fn record(&self, work: Work) -> Result<CudaGraph, RuntimeError> {
        let vision = match (work, &self.vision) {
            (Work::Vision, None) => return Err(RuntimeError::NoVision),
            (Work::Vision, vision) => vision.as_ref(),
            (Work::Prefill, _) => None,
        };
        self.device.wait()?;
        let graph = self.device.record(|| match (vision, &self.source) {
            (Some(vision), _) => vision.enqueue(&self.device, 0),
            (None, Some(source)) => source.enqueue(&self.device),
            (None, None) => self.decoder.engine.enqueue(&self.device, PREFILL),
        });
        // No rank replays while another still records.
        self.communicator.as_deref().map_or(Ok(()), Communicator::meet).map_err(RuntimeError::Ranks)?;
        graph
    }

    /// What follows once the work so far is done; work that waited for another rank in vain ends too.
    fn settled<T>(&self, result: T) -> Result<T, RuntimeError> {
        self.communicator.as_deref().map_or(Ok(()), Communicator::check).map_err(RuntimeError::Ranks)?;
        Ok(result)
    }

    /// The prompt in the caches and the first new tokens, put on the stream.
    pub fn prefill_start(&mut self, prompts: &[Vec<i32>]) -> Result<(), RuntimeError> {
        check_prompts(&self.config.build_config, prompts)?;
        let (device, config, prompts) = (&self.device, &self.config, Padded::new(prompts));
        match &mut self.source {
            Some(source) => {
                let places = source.read(device, &prompts, config)?;
                let start = source.start(prompts.batch);
                self.decoder.start(device, &start, Some(&prompts.used), places, config)?;
            }
            None => self.decoder.start(device, &prompts, None, 0, config)?,
        }
        self.last = Last::Prefill;
        Ok(())
    }
}

/// The library for a directory's engines, once it is known that it and the GPU fit.
fn ready(directory: &EngineDirectory, device: &Device) -> Result<&'static trt::Library, RuntimeError> {
    let library = trt::Library::open(&backend::find(Kind::Tensorrt)?)?;
    check_target(&directory.manifest, &library.name(), &device.gpu()?)?;
    plugins::register(library)?;
    Ok(library)
}

/// TensorRT's own description, JSON, of the layers of each of a directory's engines.
///
/// # Errors
/// As [`Tensorrt::open`].
pub fn layers(directory: &EngineDirectory) -> Result<Vec<(String, String)>, RuntimeError> {
    let device = Device::open()?;
    let library = ready(directory, &device)?;
    let describe = |network: &String| {
        let plan = trt::MappedFile::open(&directory.file(&engine_name(network, 0))?)?;
        Ok((network.clone(), trt::Engine::load(library, plan.bytes())?.describe()?))
    };
    directory.manifest.networks.iter().map(describe).collect()
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
            let to = match &mut self.source {
                Some(source) => source.pictures_mut()?,
                None => self.decoder.engine.buffer_mut("prompt_embedding_table")?,
            };
            let from = vision.buffer("output")?;
            self.device.copy(from, to, chunk * at_once * row, pictures * row)?;
        }
        if let Some(source) = &mut self.source {
            source.seen = count;
        }
        self.last = Last::Vision;
        Ok(())
    }

    fn prefill(&mut self, prompts: &[Vec<i32>]) -> Result<Vec<u32>, RuntimeError> {
        self.prefill_start(prompts)?;
        self.settled(self.decoder.first(&self.device)?)
    }

    fn decode(&mut self, limit: usize) -> Result<Vec<Vec<u32>>, RuntimeError> {
        let room = self.config.room(self.decoder.lengths.iter().copied())?;
        let steps = limit.min(STRIDE).min(room).max(1);
        self.decode_steps(steps)?;
        self.settled(self.decoder.made(&self.device, steps)?)
    }

    fn force(&mut self, tokens: &[u32]) -> Result<(), RuntimeError> {
        Ok(self.device.upload(bytemuck::cast_slice(tokens), self.decoder.engine.buffer_mut("input_ids")?)?)
    }

    fn outputs(&mut self) -> Result<BTreeMap<String, Output>, RuntimeError> {
        let decoder = &self.decoder;
        let mut engines: Vec<(&Loaded, usize)> = match self.last {
            Last::Nothing => Vec::new(),
            Last::Vision => self.vision.iter().map(|vision| (vision, 0)).collect(),
            Last::Prefill => vec![(&decoder.engine, PREFILL)],
            Last::Decode => vec![(&decoder.engine, decoder.decode_profile())],
        };
        if self.last == Last::Prefill {
            engines.extend(self.source.iter().flat_map(Source::engines).map(|engine| (engine, 0)));
        }
        let mut outputs = BTreeMap::new();
        for (engine, profile) in engines {
            // Keys and values are the decoder's business.
            for name in engine.results().into_iter().filter(|name| !name.starts_with("cross_")) {
                let (shape, values) = engine.floats(&self.device, profile, &name)?;
                outputs.insert(name, Output { shape, values });
            }
        }
        Ok(outputs)
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
