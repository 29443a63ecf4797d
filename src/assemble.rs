//! A directory from compiled networks: weights, engines, processor files, manifest.
use crate::builder::{BuildEvent, BuildFailure, BuiltEngine, ConstantPlace, Crew, EngineSpec, LocalSpec, Supervisor};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::compile::Compiled;
use crate::engine_dir::manifest::{self, Manifest, TargetEntry};
use crate::engine_dir::{DirectoryError, EngineConfig, FileEntry, PROCESSOR, Staging};
use crate::passes::Passed;
use crate::runtime::{NETWORK, WEIGHTS};
use graphs::Weight;
use quant::{QuantError, StoredWeights};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use thiserror::Error;

#[derive(Debug, Error)]
pub enum AssembleError {
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("weights of `{network}`")]
    Weights { network: String, source: QuantError },
    #[error(transparent)]
    Build(#[from] BuildFailure),
    #[error("cannot write config.json")]
    Config(#[from] serde_json::Error),
}

impl AssembleError {
    pub fn hint(&self) -> Option<String> {
        match self {
            AssembleError::Directory(error) => error.hint(),
            AssembleError::Checkpoint(error) => error.hint(),
            AssembleError::Weights { source, .. } => source.hint().or_else(|| checkpoint_hint(source)),
            AssembleError::Build(error) => error.hint(),
            AssembleError::Config(_) => None,
        }
    }
}

/// The hint of a checkpoint's fault that shows only when data is read.
fn checkpoint_hint(error: &QuantError) -> Option<String> {
    let QuantError::Read { source, .. } = error else { return None };
    std::error::Error::source(source)?.downcast_ref::<CheckpointError>()?.hint()
}

/// Engines that are wanted. A directory holds those of one library only: their files have TensorRT-LLM's names.
pub struct EngineTarget {
    /// `rtx` or `tensorrt`.
    pub name: &'static str,
    pub library: PathBuf,
    /// TensorRT-RTX: what the engines run on.
    pub gpus: Vec<u32>,
    /// TensorRT: what building for the GPU at hand needs.
    pub local: Option<LocalSpec>,
    pub optimization_level: Option<i32>,
}

pub struct Assembly<'a> {
    pub output: &'a Path,
    pub reference: bool,
    pub engines: Option<EngineTarget>,
    pub supervisor: Supervisor<'a>,
    /// Engines built at once.
    pub jobs: usize,
    /// The model as it was named.
    pub model: String,
    /// The command that builds the directory again.
    pub command: String,
}

/// What happens while a directory is made.
pub enum Event<'e> {
    /// Another build works on the same directory.
    Waiting(&'e Path),
    /// Bytes of a network's weights written, of all.
    Weights {
        network: &'e str,
        done: u64,
        total: u64,
    },
    Engine {
        network: &'e str,
        event: BuildEvent<'e>,
    },
    Built {
        /// Place among the networks that were compiled; side by side they end in another order.
        number: usize,
        network: &'e str,
        engine: &'e BuiltEngine,
    },
}

/// Writes the directory and moves it to its place when all of it is there.
///
/// # Errors
/// Whatever fails; the place is then as it was before.
pub fn assemble(
    compiled: &Compiled,
    assembly: &Assembly<'_>,
    events: &mut dyn FnMut(Event<'_>),
) -> Result<Manifest, AssembleError> {
    let mut staging = Staging::start(assembly.output, |path| events(Event::Waiting(path)))?;
    let mut config = EngineConfig::new(
        &compiled.source.model,
        compiled.dtype,
        compiled.quantization_config(),
        compiled.tp,
        compiled.sizes,
    );
    config.pretrained_config.rest.extend([
        ("use_parallel_embedding".to_owned(), compiled.divide_embedding.into()),
        ("embedding_sharding_dim".to_owned(), 0.into()),
    ]);
    let config = format!("{}\n", serde_json::to_string_pretty(&config)?);
    let built = std::thread::scope(|scope| -> Result<Option<BuiltEngine>, AssembleError> {
        let mut crew = Crew::new(scope, assembly.supervisor, assembly.jobs);
        let mut built = None;
        for (number, passed) in compiled.networks.iter().enumerate() {
            while crew.is_full()
                && let Some(engine) = next(&mut crew, compiled, &mut staging, events)?
            {
                built = Some(engine);
            }
            let network = &passed.network;
            staging.write(&format!("{}/config.json", network.name), config.as_bytes())?;
            let places = store(compiled, passed, assembly, &mut staging, &mut |event| {
                crew.listen(&mut |number, event| tell(compiled, number, event, events));
                events(event);
            })?;
            // What the engine computes; the reference interprets it, `bench` counts its work.
            staging.write(&file_of(&network.name, passed.rank, NETWORK), graphs::print(network).as_bytes())?;
            if let Some(target) = &assembly.engines {
                let (spec, work) = spec(compiled, passed, target, places, &staging)?;
                crew.start(number, spec, work);
            }
        }
        while let Some(engine) = next(&mut crew, compiled, &mut staging, events)? {
            built = Some(engine);
        }
        Ok(built)
    })?;
    for (name, text) in [(RECIPE, &compiled.chosen.language), (VISION_RECIPE, &compiled.chosen.vision)] {
        if let Some(text) = text {
            staging.write(name, text.as_bytes())?;
        }
    }
    staging.discard(WORK)?;
    copy_processor(compiled, &staging)?;
    compiled.source.checkpoints().try_for_each(Checkpoint::unchanged)?;
    let mut targets = BTreeMap::new();
    if assembly.reference {
        targets.insert("reference".to_owned(), TargetEntry::default());
    }
    if let (Some(target), Some(BuiltEngine { library, gpu, .. })) = (&assembly.engines, built) {
        let gpus = target.gpus.iter().copied().chain(gpu.as_ref().map(|gpu| gpu.capability));
        let gpus = gpus.map(|gpu| format!("sm{gpu}")).collect();
        let entry = TargetEntry { library: Some(library), gpus, built_on: gpu.map(|gpu| gpu.name) };
        targets.insert(target.name.to_owned(), entry);
    }
    Ok(staging.publish(Manifest {
        schema: manifest::SCHEMA,
        version: env!("CARGO_PKG_VERSION").into(),
        model: assembly.model.clone(),
        model_type: compiled.source.facts().model_type.into(),
        dtype: compiled.dtype,
        quantization: compiled.quantization.clone(),
        tp: compiled.tp,
        targets,
        networks: compiled
            .networks
            .iter()
            .filter(|passed| passed.rank == 0)
            .map(|passed| passed.network.name.clone())
            .collect(),
        files: BTreeMap::new(),
        command: assembly.command.clone(),
        built_at: manifest::timestamp(),
    })?)
}

/// Recipes that were chosen for the model; as `--quant` and `--vision-quant` they give the same again.
pub const RECIPE: &str = "recipe.toml";
pub const VISION_RECIPE: &str = "vision-recipe.toml";

/// Files that only the build itself needs.
const WORK: &str = ".work";

/// Weights that an engine alone needs, which the checkpoint does not have as they are.
fn work_weights(passed: &Passed) -> String {
    format!("{WORK}/{}-{}-{WEIGHTS}", passed.network.name, passed.rank)
}

/// Path of a network's engine in the directory.
pub fn engine_name(network: &str, rank: usize) -> String {
    if network == "vision" { format!("{network}/model.engine") } else { format!("{network}/rank{rank}.engine") }
}

/// Path of one rank's file of a network; the first has no number.
pub fn file_of(network: &str, rank: usize, file: &str) -> String {
    if rank == 0 { format!("{network}/{file}") } else { format!("{network}/rank{rank}.{file}") }
}

/// Writes the weights that the targets need and says where each lies. The reference needs all of them in the directory;
/// an engine alone takes what the checkpoint already holds in its final form from there.
fn store(
    compiled: &Compiled,
    passed: &Passed,
    assembly: &Assembly<'_>,
    staging: &mut Staging,
    events: &mut dyn FnMut(Event<'_>),
) -> Result<BTreeMap<String, ConstantPlace>, AssembleError> {
    let network = &passed.network;
    let failed = |source| AssembleError::Weights { network: network.name.clone(), source };
    let mut places = BTreeMap::new();
    let mut stored: Vec<&Weight> = Vec::new();
    let mut seen = BTreeSet::new();
    for (_, weight) in network.weights() {
        if !seen.insert(weight.key()) {
            continue;
        }
        match mapped(compiled, weight).filter(|_| !assembly.reference) {
            Some(place) => drop(places.insert(weight.key(), place)),
            None => stored.push(weight),
        }
    }
    if stored.is_empty() {
        return Ok(places);
    }
    let name = if assembly.reference { file_of(&network.name, passed.rank, WEIGHTS) } else { work_weights(passed) };
    let path = staging.place(&name)?;
    let label = passed.label();
    let mut progress = |done, total| events(Event::Weights { network: &label, done, total });
    let weights = stored.iter().copied();
    let summary = quant::store_weights(weights, compiled, compiled.dtype, &path, &mut progress).map_err(failed)?;
    staging.written(&name, FileEntry { bytes: summary.bytes, sha256: summary.sha256 });
    let file = StoredWeights::open(&path).map_err(failed)?;
    for weight in stored {
        let (values, scale) = file.place_of(weight).map_err(failed)?;
        let key = weight.key();
        let scale = scale.map(|place| (format!("{key}.scale"), place));
        for (key, place) in std::iter::once((key, values)).chain(scale) {
            let quant::Place { dtype, shape, offset, bytes } = place;
            places.insert(key, ConstantPlace { file: path.clone(), offset, bytes, dtype, shape });
        }
    }
    Ok(places)
}

/// Where a plain weight lies in the checkpoint, whole or some of its rows, if it is there in the network's own type and at a
/// place that suits TensorRT.
fn mapped(compiled: &Compiled, weight: &Weight) -> Option<ConstantPlace> {
    match weight {
        Weight::Tensor { name, .. } => {
            let (_, entry) = compiled.source.tensor(name)?;
            let (file, offset) = (compiled.source.file_of(name)?.to_path_buf(), entry.offset);
            let place =
                ConstantPlace { file, offset, bytes: entry.bytes, dtype: entry.dtype, shape: entry.shape.clone() };
            (entry.dtype == compiled.dtype && offset.is_multiple_of(8)).then_some(place)
        }
        Weight::Slice { axis: 0, start, end, of } => {
            let whole = mapped(compiled, of)?;
            let row = whole.bytes / (*whole.shape.first()? as u64).max(1);
            let (offset, bytes) = (whole.offset + *start as u64 * row, (end - start) as u64 * row);
            offset.is_multiple_of(8).then(|| ConstantPlace { offset, bytes, shape: weight.shape(), ..whole })
        }
        _ => None,
    }
}

/// What a child is told, and the folder that it works in.
fn spec(
    compiled: &Compiled,
    passed: &Passed,
    target: &EngineTarget,
    constants: BTreeMap<String, ConstantPlace>,
    staging: &Staging,
) -> Result<(EngineSpec, PathBuf), AssembleError> {
    let network = &passed.network;
    let spec = EngineSpec {
        name: network.name.clone(),
        label: passed.label(),
        network: staging.place(&file_of(&network.name, passed.rank, NETWORK))?,
        library: target.library.clone(),
        gpus: target.gpus.clone(),
        local: target.local.clone(),
        optimization_level: target.optimization_level,
        sizes: compiled.sizes,
        constants,
        engine: staging.place(&engine_name(&network.name, passed.rank))?,
    };
    Ok((spec, staging.folder(&format!("{WORK}/{}-{}", network.name, passed.rank))?))
}

/// Waits for a child to end and takes its engine over; `None` where none works any more.
fn next(
    crew: &mut Crew<'_, '_>,
    compiled: &Compiled,
    staging: &mut Staging,
    events: &mut dyn FnMut(Event<'_>),
) -> Result<Option<BuiltEngine>, AssembleError> {
    let ended = crew.next(&mut |number, event| tell(compiled, number, event, events));
    let Some((number, engine)) = ended else { return Ok(None) };
    let engine = engine?;
    let Some(passed) = compiled.networks.get(number) else { return Ok(Some(engine)) };
    let name = engine_name(&passed.network.name, passed.rank);
    staging.written(&name, FileEntry { bytes: engine.bytes, sha256: engine.sha256.clone() });
    // The disk holds the cut weights of no more ranks than are built at once.
    staging.discard(&work_weights(passed))?;
    events(Event::Built { number, network: &passed.label(), engine: &engine });
    Ok(Some(engine))
}

fn tell(compiled: &Compiled, number: usize, event: BuildEvent<'_>, events: &mut dyn FnMut(Event<'_>)) {
    let label = compiled.networks.get(number).map(Passed::label).unwrap_or_default();
    events(Event::Engine { network: &label, event });
}

/// What a run reads besides the engines.
fn copy_processor(compiled: &Compiled, staging: &Staging) -> Result<(), AssembleError> {
    for name in crate::processor::FILES {
        // What the model itself lacks may lie with a part of it, or with its language part.
        let mut files = compiled.source.folders().into_iter().map(|folder| folder.join(name));
        if let Some(from) = files.find(|file| file.is_file()) {
            let to = staging.place(&format!("{PROCESSOR}/{name}"))?;
            std::fs::copy(&from, &to).map_err(DirectoryError::io("copy", &from))?;
        }
    }
    Ok(())
}
