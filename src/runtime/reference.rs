//! The reference target: the network text and the stored weights of an engine directory, interpreted on the CPU.
use super::{Executor, RuntimeError};
use crate::engine_dir::{EngineConfig, EngineDirectory};
use graphs::Network;
use graphs::interpret::{Array, Caches, Interpreter, Values};
use std::collections::BTreeMap;

/// File names of the reference target in a sub-network's folder.
pub const NETWORK: &str = "network.txt";
pub const WEIGHTS: &str = "weights.safetensors";

pub struct Reference {
    vision: Option<Interpreter>,
    language: Interpreter,
    config: EngineConfig,
    /// Prompt table `[rows, hidden]`.
    table: Array,
    caches: Caches,
    /// Tokens of each request that lie in the caches.
    lengths: Vec<i32>,
}

impl Reference {
    /// Loads the networks of a directory.
    ///
    /// # Errors
    /// Files that are missing, changed or do not belong together.
    pub fn open(directory: &EngineDirectory) -> Result<Reference, RuntimeError> {
        let load = |name: &str| -> Result<Interpreter, RuntimeError> {
            let path = directory.file(&format!("{name}/{NETWORK}"))?;
            let text = std::fs::read_to_string(&path).map_err(crate::engine_dir::DirectoryError::io("read", &path))?;
            let network = graphs::parse(&text)?;
            graphs::verify(&network)?;
            let weights = quant::StoredWeights::open(&directory.file(&format!("{name}/{WEIGHTS}"))?)?;
            Ok(Interpreter::new(network, &weights)?)
        };
        let vision = directory.manifest.networks.iter().any(|name| name == "vision");
        let vision = if vision { Some(load("vision")?) } else { None };
        Reference::new(vision, load("language")?, directory.config("language")?)
    }

    /// Interprets networks that were never written to a directory.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn from_networks(
        networks: Vec<Network>,
        weights: &dyn Values,
        config: EngineConfig,
    ) -> Result<Reference, RuntimeError> {
        let (mut vision, mut language) = (None, None);
        for network in networks {
            let slot = if network.name == "vision" { &mut vision } else { &mut language };
            *slot = Some(Interpreter::new(network, weights)?);
        }
        let missing = || RuntimeError::Inconsistent { what: "list of networks".into() };
        Reference::new(vision, language.ok_or_else(missing)?, config)
    }

    fn new(
        vision: Option<Interpreter>,
        language: Interpreter,
        config: EngineConfig,
    ) -> Result<Reference, RuntimeError> {
        let hidden = config.pretrained_config.hidden_size;
        let caches = Caches::new(language.network(), 0, 0);
        let table = Array::float([1, hidden], vec![0.0; hidden]);
        Ok(Reference { vision, language, config, table, caches, lengths: Vec::new() })
    }

    /// Logits `[requests, vocab]` after feeding each request `tokens` ids (all alike in number, padded on the right);
    /// `used` of them count. `table` holds the pictures that the ids name.
    fn step(&mut self, ids: Vec<i32>, tokens: usize, used: &[i32], table: Array) -> Result<Array, RuntimeError> {
        let batch = self.lengths.len();
        let positions = self.lengths.iter().flat_map(|&past| (0..tokens as i32).map(move |token| past + token));
        let sequence: Vec<i32> = std::iter::zip(&self.lengths, used).map(|(past, used)| past + used).collect();
        let inputs = BTreeMap::from([
            ("input_ids", Array::int([batch, tokens], ids)),
            ("position_ids", Array::int([batch, tokens], positions.collect())),
            ("past_lengths", Array::int([batch], self.lengths.clone())),
            ("sequence_lengths", Array::int([batch], sequence.clone())),
            ("last_token_ids", Array::int([batch], used.iter().map(|used| used - 1).collect())),
            ("prompt_embedding_table", table),
        ]);
        let mut outputs = self.language.run(&inputs, &mut self.caches, None)?;
        self.lengths = sequence;
        outputs.remove("logits").ok_or_else(|| RuntimeError::Inconsistent { what: "language network".into() })
    }
}

impl Executor for Reference {
    fn see(&mut self, pixels: Vec<f32>, count: usize) -> Result<(), RuntimeError> {
        let vision = self.vision.as_ref().ok_or(RuntimeError::NoVision)?;
        let config = &self.config.pretrained_config;
        let multimodal = config.multimodal.ok_or(RuntimeError::NoVision)?;
        let (found, limit) =
            (count * multimodal.num_visual_features, self.config.build_config.max_prompt_embedding_table_size);
        if found > limit {
            return Err(RuntimeError::TooManyPictures { found, limit });
        }
        let [height, width] = multimodal.image_size;
        let channels = pixels.len() / (count * height * width).max(1);
        let pixels = Array::float([count, channels, height, width], pixels);
        let mut caches = Caches::new(vision.network(), count, 0);
        let mut outputs = vision.run(&BTreeMap::from([("input", pixels)]), &mut caches, None)?;
        let output = outputs.remove("output");
        let output = output.ok_or_else(|| RuntimeError::Inconsistent { what: "vision network".into() })?;
        self.table = Array { shape: vec![found, config.hidden_size], data: output.data };
        Ok(())
    }

    fn prefill(&mut self, prompts: &[Vec<i32>]) -> Result<Vec<u32>, RuntimeError> {
        let sizes = self.config.build_config;
        if prompts.len() > sizes.max_batch_size {
            return Err(RuntimeError::TooManyRequests { found: prompts.len(), limit: sizes.max_batch_size });
        }
        for (request, prompt) in prompts.iter().enumerate() {
            if prompt.is_empty() {
                return Err(RuntimeError::EmptyPrompt { request });
            }
            if prompt.len() > sizes.max_input_len {
                let (found, limit) = (prompt.len(), sizes.max_input_len);
                return Err(RuntimeError::PromptTooLong { request, found, limit });
            }
        }
        self.caches = Caches::new(self.language.network(), prompts.len(), sizes.max_seq_len);
        self.lengths = vec![0; prompts.len()];
        let tokens = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let padded = |prompt: &Vec<i32>| {
            let padding = tokens - prompt.len();
            prompt.iter().copied().chain(std::iter::repeat_n(0, padding)).collect::<Vec<_>>()
        };
        let ids = prompts.iter().flat_map(padded).collect();
        let used: Vec<i32> = prompts.iter().map(|prompt| prompt.len() as i32).collect();
        let logits = self.step(ids, tokens, &used, self.table.clone())?;
        best(&logits)
    }

    fn decode(&mut self, tokens: &[u32]) -> Result<Vec<u32>, RuntimeError> {
        let limit = self.config.build_config.max_output_len;
        if self.lengths.iter().any(|&length| length as usize >= self.config.build_config.max_seq_len) {
            return Err(RuntimeError::TooManyTokens { found: limit + 1, limit });
        }
        let ids = tokens.iter().map(|&token| token as i32).collect();
        let used = vec![1; tokens.len()];
        // New tokens are words: no row of the table is asked for any more.
        let hidden = self.config.pretrained_config.hidden_size;
        let logits = self.step(ids, 1, &used, Array::float([1, hidden], vec![0.0; hidden]))?;
        best(&logits)
    }
}

/// The largest logit of each row; the first of equals, as PyTorch's argmax.
fn best(logits: &Array) -> Result<Vec<u32>, RuntimeError> {
    let values = logits.floats().map_err(|what| RuntimeError::Inconsistent { what })?;
    let width = logits.shape.last().copied().unwrap_or(1).max(1);
    let row = |row: &[f32]| {
        let start = (0, f32::NEG_INFINITY);
        row.iter().enumerate().fold(start, |best, (id, &value)| if value > best.1 { (id, value) } else { best }).0
            as u32
    };
    Ok(values.chunks_exact(width).map(row).collect())
}
