//! From a checkpoint to networks that a target can take: what `build`, `plan` and `eval` have in common.
use crate::calibration::{SearchError, Statistics, StatisticsError, Vectors, Wanted, fingerprint};
use crate::checkpoint::{Checkpoint, Options};
use crate::engine_dir::{SizeError, SizeRequest, Sizes};
use crate::passes::{self, PassError, Passed};
use crate::source::{ModelError, ModelSource};
use crate::vision_tower;
use clap::ValueEnum;
use graphs::{DType, Logits, Network};
use quant::{Entry, Method, QuantError, Recipe, Source, SourceError};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use thiserror::Error;

#[derive(Debug, Error)]
pub enum CompileError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Size(#[from] SizeError),
    #[error(transparent)]
    Pass(#[from] PassError),
    #[error(transparent)]
    Recipe(#[from] QuantError),
    #[error(transparent)]
    Statistics(#[from] StatisticsError),
    #[error("--vision-quant is given, but the model has no vision network")]
    NoVision,
    #[error("--tp 0: there is at least one rank")]
    NoRanks,
    #[error("`{folder}` holds no tokenizer: found neither {}", TOKENIZERS.join(" nor "))]
    NoTokenizer { folder: PathBuf },
}

impl CompileError {
    pub fn hint(&self) -> Option<String> {
        match self {
            CompileError::Model(error) => error.hint(),
            CompileError::Size(error) => error.hint(),
            CompileError::Pass(error) => error.hint(),
            CompileError::Recipe(error) => error.hint(),
            CompileError::Statistics(error) => error.hint(),
            CompileError::NoVision => Some("leave --vision-quant out".into()),
            CompileError::NoRanks => Some("--tp 1 builds the whole".into()),
            CompileError::NoTokenizer { .. } => Some("give the folder that the model was converted from".into()),
        }
    }
}

/// One of these is a tokenizer.
pub const TOKENIZERS: [&str; 3] = ["tokenizer.json", "tokenizer.model", "spiece.model"];

/// How keys and values of earlier tokens are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KvCache {
    /// In the networks' own type
    Auto,
    /// As INT8, each token and head with a scale of its own
    Int8,
}

/// What is asked for on the command line.
#[derive(Clone)]
pub struct Request {
    /// A folder or a hub id.
    pub model: String,
    /// Likewise, of the language part where that is a checkpoint of its own.
    pub language: Option<String>,
    /// Likewise, of the vision tower where it is not the one that config.json names.
    pub vision_tower: Option<String>,
    /// A folder whose tokenizer is the model's.
    pub tokenizer: Option<PathBuf>,
    /// The checkpoint's own type where nothing is asked for.
    pub dtype: Option<DType>,
    /// Preset or recipe file of the language network.
    pub quant: String,
    pub vision_quant: String,
    /// Recipes in place of names that stand for none until one is chosen for the model.
    pub chosen: Chosen,
    /// A file that `calibrate` wrote.
    pub calibration: Option<PathBuf>,
    pub kv_cache: KvCache,
    pub tp: usize,
    /// Ranks have a part of the table of words each, not all of it.
    pub divide_embedding: bool,
    pub sizes: SizeRequest,
    pub logits: Logits,
    /// Where the text after each pass is written.
    pub dump: Option<PathBuf>,
    /// Patterns of paths whose results become outputs too.
    pub marks: Vec<String>,
}

/// Texts of recipes that were chosen for a model (`auto:BITS`).
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Chosen {
    pub language: Option<String>,
    pub vision: Option<String>,
}

pub struct Compiled {
    pub source: ModelSource,
    pub dtype: DType,
    pub sizes: Sizes,
    /// Ranks of tensor parallelism.
    pub tp: usize,
    /// The table of words is divided among them.
    pub divide_embedding: bool,
    /// With every rank's part of those that are divided, one after the other.
    pub networks: Vec<Passed>,
    /// Name of the recipe of each sub-network.
    pub quantization: BTreeMap<String, String>,
    pub chosen: Chosen,
    language_recipe: Recipe,
    vision_recipe: Recipe,
    statistics: Option<Statistics>,
    vectors: Vectors,
}

/// Reads headers only; no tensor data is touched.
///
/// # Errors
/// Whatever does not fit together, before anything is read or written.
pub fn compile(request: &Request, options: &Options<'_>) -> Result<Compiled, CompileError> {
    if request.tp == 0 {
        return Err(CompileError::NoRanks);
    }
    let load = |name: &str, chosen: &Option<String>| match chosen {
        Some(text) => Recipe::parse(text, name),
        None => Recipe::load(name),
    };
    let language = load(&request.quant, &request.chosen.language)?;
    let vision = load(&request.vision_quant, &request.chosen.vision)?;
    let open = |model: &str| Checkpoint::open(model, options).map_err(ModelError::from);
    let checkpoint = open(&request.model)?;
    let from_hub = !Path::new(&request.model).exists();
    let tower = vision_tower::open(&checkpoint, request.vision_tower.as_deref(), from_hub, options)?;
    let mut source = match (&request.language, tower) {
        (Some(language), _) => ModelSource::with_language(checkpoint, open(language)?)?,
        (None, Some(tower)) => ModelSource::with_tower(checkpoint, tower)?,
        (None, None) => ModelSource::new(checkpoint)?,
    };
    if let Some(folder) = &request.tokenizer {
        if !TOKENIZERS.iter().any(|name| folder.join(name).is_file()) {
            return Err(CompileError::NoTokenizer { folder: folder.clone() });
        }
        source.tokenizer = Some(folder.clone());
    }
    let sizes = request.sizes.resolve(&source.facts())?;
    let dtype = request.dtype.unwrap_or_else(|| source.dtype());
    let networks = source.networks(dtype, request.logits)?;
    if vision.name != "none" && networks.iter().all(|network| network.name != "vision") {
        return Err(CompileError::NoVision);
    }
    for (recipe, seen) in [(&vision, true), (&language, false)] {
        let own: Vec<&Network> = networks.iter().filter(|network| (network.name == "vision") == seen).collect();
        passes::check_recipe(recipe, &own)?;
    }
    let mut quantization = BTreeMap::new();
    let mut passed = Vec::new();
    for network in networks {
        let recipe = if network.name == "vision" { &vision } else { &language };
        // What the checkpoint brings is named by the tool that made it.
        let tools = network.weights().flat_map(|(_, weight)| weight.tensors());
        let tool = tools.into_iter().find_map(|(name, _)| source.quantized_by(name));
        let name = match (tool, recipe.name.as_str()) {
            (None, recipe) => recipe.to_owned(),
            (Some(tool), "none") => tool.to_owned(),
            (Some(tool), recipe) => format!("{tool} and {recipe}"),
        };
        quantization.insert(network.name.clone(), name);
        let quantized = |name: &str| source.quantized_linear(name);
        // Pictures are seen by every rank alike.
        let ranks = if network.name == "vision" { 1 } else { request.tp };
        for rank in 0..ranks {
            // One rank's text is enough.
            let dump = request.dump.clone().filter(|_| rank == 0);
            let plan = passes::Plan {
                dump,
                marks: &request.marks,
                int8_kv_cache: request.kv_cache == KvCache::Int8,
                quantized: &quantized,
                rank,
                ranks,
                divide_embedding: request.divide_embedding,
                ..passes::Plan::new(recipe)
            };
            let mut found = passes::run(network.clone(), &plan)?;
            if rank > 0 {
                // The same vectors as of the first.
                found.wanted.clear();
            }
            passed.push(found);
        }
    }
    let idle = |pattern: &&String| passed.iter().all(|passed: &Passed| !passed.marked.contains(pattern));
    if let Some(pattern) = request.marks.iter().find(idle) {
        let reason = "it matches no layer".to_owned();
        return Err(PassError::Mark { pattern: pattern.clone(), reason }.into());
    }
    let wanted = || passed.iter().flat_map(|passed| &passed.wanted);
    let statistics = statistics(request, &source, dtype, wanted())?;
    let vectors = Vectors::new(wanted());
    Ok(Compiled {
        source,
        dtype,
        sizes,
        tp: request.tp,
        divide_embedding: request.tp > 1 && request.divide_embedding,
        networks: passed,
        quantization,
        chosen: request.chosen.clone(),
        language_recipe: language,
        vision_recipe: vision,
        statistics,
        vectors,
    })
}

/// The file of statistics where one is needed: of this model, with all that is wanted in it.
fn statistics<'w>(
    request: &Request,
    source: &ModelSource,
    dtype: DType,
    wanted: impl Iterator<Item = &'w Wanted>,
) -> Result<Option<Statistics>, CompileError> {
    let inputs: Vec<&str> = wanted.filter_map(Wanted::input).collect();
    if inputs.is_empty() {
        return Ok(None);
    }
    let path = request.calibration.as_ref().ok_or(StatisticsError::NoStatistics)?;
    let statistics = open_statistics(path, source, dtype)?;
    if let Some(input) = inputs.into_iter().find(|input| !statistics.has(input)) {
        return Err(StatisticsError::Lacks { path: path.clone(), input: input.into() }.into());
    }
    Ok(Some(statistics))
}

/// Those of this model, or none.
fn open_statistics(path: &Path, source: &ModelSource, dtype: DType) -> Result<Statistics, CompileError> {
    let statistics = Statistics::open(path)?;
    statistics.check(&fingerprint(source)?, dtype)?;
    Ok(statistics)
}

/// The checkpoint's tensors, and the vectors found for its quantization.
impl Source for Compiled {
    fn entry(&self, name: &str) -> Option<Entry> {
        self.vectors.over(&self.source).entry(name)
    }

    fn read(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        self.vectors.over(&self.source).read(name, offset, buffer)
    }
}

impl Compiled {
    /// Number of vectors that [`Self::search`] finds.
    pub fn searches(&self) -> usize {
        self.networks.iter().map(|passed| passed.wanted.len()).sum()
    }

    /// Opens statistics that the quantization itself can do without.
    ///
    /// # Errors
    /// A file that is none, or of another model or type.
    pub fn open_statistics(&mut self, path: &Path) -> Result<(), CompileError> {
        if self.statistics.is_none() {
            self.statistics = Some(open_statistics(path, &self.source, self.dtype)?);
        }
        Ok(())
    }

    pub fn statistics(&self) -> Option<&Statistics> {
        self.statistics.as_ref()
    }

    /// What decides for a network's layers.
    pub fn recipe(&self, network: &str) -> &Recipe {
        if network == "vision" { &self.vision_recipe } else { &self.language_recipe }
    }

    /// Takes over what was found for the same quantization.
    pub fn take_vectors(&mut self, other: Compiled) {
        self.vectors = other.vectors;
    }

    /// Finds what smoothing and clipping need; without it only shapes can be asked for. `progress` is told the vectors found
    /// and their number.
    ///
    /// # Errors
    /// Weights or statistics that cannot be read.
    pub fn search(&mut self, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<(), SearchError> {
        let wanted: Vec<&Wanted> = self.networks.iter().flat_map(|passed| &passed.wanted).collect();
        self.vectors.search(&wanted, &self.source, self.statistics.as_ref(), self.dtype, progress)
    }

    /// The `quantization` object of config.json, in TensorRT-LLM's words where it has them.
    pub fn quantization_config(&self) -> Value {
        use graphs::{Format, Op};
        let language = self.networks.iter().find(|passed| ["language", "decoder"].contains(&&*passed.network.name));
        let choices = language.into_iter().flat_map(|passed| &passed.assignments);
        let choices = choices.filter_map(|choice| Some((choice.format?, choice.method)));
        let recipe = self.quantization.get("language").or_else(|| self.quantization.get("decoder"));
        let ops = || language.into_iter().flat_map(|passed| &passed.network.nodes).map(|node| &node.op);
        let rounded = ops().find_map(|op| match op {
            Op::QuantizeInput { scale, .. } => Some(scale.is_some()),
            _ => None,
        });
        let prescaled = ops().any(|op| matches!(op, Op::ScaleBy { .. }));
        let corrected = |passed: &Passed| passed.network.nodes.iter().any(|node| node.path.ends_with("/corrected"));
        let tool = recipe.map_or("", String::as_str);
        let mut algorithm = Value::Null;
        let mut group = 0;
        for (format, method) in choices {
            let own = json!(match (format, rounded) {
                (Format::Int8, None) => "W8A16",
                (Format::Int8, Some(true)) => "W8A8_SQ_PER_CHANNEL",
                (Format::Int8, Some(false)) => "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
                (Format::Int4 { .. }, _) if tool.starts_with("gptq") => "W4A16_GPTQ",
                (Format::Int4 { .. }, _) if tool.starts_with("awq") || prescaled || method == Method::Awq =>
                    "W4A16_AWQ",
                (Format::Int4 { .. }, _) => "W4A16",
            });
            let mixed = !algorithm.is_null() && algorithm != own;
            algorithm = if mixed { json!("MIXED_PRECISION") } else { own };
            if let Format::Int4 { group: size } = format {
                group = group.max(size);
            }
        }
        let int8_kv_cache = language.is_some_and(|passed| passed.network.caches().iter().any(|cache| cache.int8));
        let kept = int8_kv_cache.then_some("INT8");
        let mut config = json!({ "quant_algo": algorithm, "kv_cache_quant_algo": kept, "recipe": recipe });
        if group > 0 {
            config["group_size"] = json!(group);
        }
        if language.is_some_and(corrected) {
            config["has_zero_point"] = json!(true);
        }
        if prescaled {
            config["pre_quant_scale"] = json!(true);
        }
        config
    }
}
