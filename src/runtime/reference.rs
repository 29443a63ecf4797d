//! The reference target: the network text and the stored weights of an engine directory, interpreted on the CPU.
use super::choice::best;
use super::{Executor, Output, RuntimeError, check_prompts};
use crate::assemble::file_of;
use crate::engine_dir::{EngineConfig, EngineDirectory};
use crate::lower::LOGITS;
use graphs::interpret::{Array, Caches, Collective, Interpreter, Values};
use graphs::{Network, Op};
use std::collections::BTreeMap;
use std::sync::Arc;

/// File names of the reference target in a sub-network's folder.
pub const NETWORK: &str = "network.txt";
pub const WEIGHTS: &str = "weights.safetensors";

pub struct Reference {
    vision: Option<Interpreter>,
    /// What reads the prompt where the language network is a decoder of its own.
    source: Option<Source>,
    language: Interpreter,
    config: EngineConfig,
    /// Prompt table `[rows, hidden]`.
    table: Array,
    caches: Caches,
    /// Tokens of each request that lie in the caches.
    lengths: Vec<i32>,
    /// What each request is fed next.
    tokens: Vec<u32>,
    /// What the last call gave.
    outputs: BTreeMap<String, Array>,
}

/// What an encoder-decoder model's decoder reads.
struct Source {
    /// None where pictures are what is read.
    encoder: Option<Interpreter>,
    cross: Interpreter,
    /// What the decoder starts with.
    start_id: i32,
    /// What the decoder reads of the prompts or pictures at every step.
    read: BTreeMap<String, Array>,
    /// Other results of reading: the encoder's output, and what was marked.
    shown: BTreeMap<String, Array>,
}

impl Source {
    /// Reads prompts `[batch, source]` of which `lengths` tokens count.
    fn read(&mut self, ids: Array, lengths: &[i32], table: Array) -> Result<(), RuntimeError> {
        let Some(encoder) = &self.encoder else { return self.look(lengths.len(), table) };
        let (batch, tokens) = (lengths.len(), ids.len() / lengths.len().max(1));
        let lengths = Array::int([batch], lengths.to_vec());
        let inputs = BTreeMap::from([
            ("input_ids", ids),
            ("position_ids", Array::int([batch, tokens], (0..tokens as i32).collect::<Vec<_>>().repeat(batch))),
            ("source_lengths", lengths.clone()),
            ("prompt_embedding_table", table),
        ]);
        let mut none = Caches::new(encoder.network(), 0, 0);
        let encoded = encoder.run(&inputs, &mut none, None)?;
        let crossed = self.cross.run(&encoded, &mut none, None)?;
        let (read, marked): (BTreeMap<_, _>, BTreeMap<_, _>) =
            crossed.into_iter().partition(|(name, _)| name.starts_with("cross_"));
        (self.read, self.shown) = (read, encoded);
        self.shown.extend(marked);
        self.read.insert("source_lengths".into(), lengths);
        Ok(())
    }

    /// Takes the pictures that were seen last, one for each request: all their features.
    fn look(&mut self, requests: usize, table: Array) -> Result<(), RuntimeError> {
        let [rows, hidden] = table.shape[..] else {
            return Err(RuntimeError::Inconsistent { what: "vision network".into() });
        };
        let features = Array { shape: vec![requests, rows / requests.max(1), hidden], data: table.data };
        let mut none = Caches::new(self.cross.network(), 0, 0);
        self.read = self.cross.run(&BTreeMap::from([("encoder_output", features)]), &mut none, None)?;
        Ok(())
    }
}

impl Reference {
    /// Loads the networks of a directory.
    ///
    /// # Errors
    /// Files that are missing, changed or do not belong together.
    pub fn open(directory: &EngineDirectory) -> Result<Reference, RuntimeError> {
        Reference::open_rank(directory, 0)
    }

    /// One rank of a divided model.
    ///
    /// # Errors
    /// As [`Reference::open`].
    pub fn open_rank(directory: &EngineDirectory, rank: usize) -> Result<Reference, RuntimeError> {
        let load = |name: &str| -> Result<Interpreter, RuntimeError> {
            // There is one vision network for all.
            let rank = if name == "vision" { 0 } else { rank };
            let path = directory.file(&file_of(name, rank, NETWORK))?;
            let text = std::fs::read_to_string(&path).map_err(crate::engine_dir::DirectoryError::io("read", &path))?;
            let network = graphs::parse(&text)?;
            graphs::verify(&network)?;
            let weights = quant::StoredWeights::open(&directory.file(&file_of(name, rank, WEIGHTS))?)?;
            Ok(Interpreter::new(network, &weights)?)
        };
        let has = |name: &str| directory.manifest.networks.iter().any(|network| network == name);
        let load_if = |name: &str| if has(name) { load(name).map(Some) } else { Ok(None) };
        let networks = [load_if("vision")?, load_if("encoder")?, load_if("cross")?];
        Reference::new(networks, load(directory.language())?, directory.config(directory.language())?)
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
        let mut loaded = [None, None, None];
        let mut language = None;
        for network in networks {
            let slot = match network.name.as_str() {
                "vision" => &mut loaded[0],
                "encoder" => &mut loaded[1],
                "cross" => &mut loaded[2],
                _ => &mut language,
            };
            *slot = Some(Interpreter::new(network, weights)?);
        }
        let missing = || RuntimeError::Inconsistent { what: "list of networks".into() };
        Reference::new(loaded, language.ok_or_else(missing)?, config)
    }

    fn new(
        [vision, encoder, cross]: [Option<Interpreter>; 3],
        language: Interpreter,
        config: EngineConfig,
    ) -> Result<Reference, RuntimeError> {
        let hidden = config.pretrained_config.hidden_size;
        let caches = Caches::new(language.network(), 0, 0);
        let table = Array::float([1, hidden], vec![0.0; hidden]);
        let pages = config.reads_pages();
        let source = match (encoder, cross, config.pretrained_config.decoder_start_token_id) {
            (encoder, Some(cross), Some(start)) if encoder.is_some() || pages => {
                Some(Source { encoder, cross, start_id: start as i32, read: BTreeMap::new(), shown: BTreeMap::new() })
            }
            (None, None, _) => None,
            _ => return Err(RuntimeError::Inconsistent { what: "list of networks".into() }),
        };
        let (lengths, tokens, outputs) = (Vec::new(), Vec::new(), BTreeMap::new());
        Ok(Reference { vision, source, language, config, table, caches, lengths, tokens, outputs })
    }

    /// One rank of a divided model; each of the others runs in its thread, with the same prompts.
    pub fn with_collective(self, collective: &Arc<dyn Collective>) -> Reference {
        let with = |interpreter: Interpreter| interpreter.with_collective(collective.clone());
        let source =
            self.source.map(|source| Source { encoder: source.encoder.map(with), cross: with(source.cross), ..source });
        Reference { language: with(self.language), source, ..self }
    }

    /// With every result rounded to its type, as no engine can do better.
    pub fn rounded(self) -> Reference {
        let source = self.source.map(|source| Source {
            encoder: source.encoder.map(Interpreter::rounded),
            cross: source.cross.rounded(),
            ..source
        });
        let (vision, language) = (self.vision.map(Interpreter::rounded), self.language.rounded());
        Reference { vision, language, source, ..self }
    }

    /// Whether layers round what they read, or what they keep of it, to INT8.
    pub fn quantizes_inputs(&self) -> bool {
        let source = self.source.iter().flat_map(|source| source.encoder.iter().chain([&source.cross]));
        let networks = self.vision.iter().chain(source).chain([&self.language]).map(Interpreter::network);
        networks.flat_map(|network| &network.nodes).any(|node| match &node.op {
            Op::QuantizeInput { .. } => true,
            Op::Attention(attention) => attention.int8_cache,
            _ => false,
        })
    }

    /// For steps of words, which ask for no row of the table.
    fn no_table(&self) -> Array {
        let hidden = self.config.pretrained_config.hidden_size;
        Array::float([1, hidden], vec![0.0; hidden])
    }

    /// The likeliest next tokens after feeding each request `tokens` ids (all alike in number, padded on the right);
    /// `used` of them count. `table` holds the pictures that the ids name.
    fn step(&mut self, ids: Vec<i32>, tokens: usize, used: &[i32], table: Array) -> Result<Vec<u32>, RuntimeError> {
        let batch = self.lengths.len();
        let positions = self.lengths.iter().flat_map(|&past| (0..tokens as i32).map(move |token| past + token));
        let sequence: Vec<i32> = std::iter::zip(&self.lengths, used).map(|(past, used)| past + used).collect();
        let own = [
            ("input_ids", Array::int([batch, tokens], ids)),
            ("position_ids", Array::int([batch, tokens], positions.collect())),
            ("past_lengths", Array::int([batch], self.lengths.clone())),
            ("sequence_lengths", Array::int([batch], sequence.clone())),
            ("last_token_ids", Array::int([batch], used.iter().map(|used| used - 1).collect())),
            ("prompt_embedding_table", table),
        ];
        let mut inputs = self.source.as_ref().map(|source| source.read.clone()).unwrap_or_default();
        inputs.extend(own.map(|(name, array)| (name.to_owned(), array)));
        self.outputs = self.language.run(&inputs, &mut self.caches, None)?;
        self.lengths = sequence;
        let logits = self.outputs.get(LOGITS);
        let logits = logits.ok_or_else(|| RuntimeError::Inconsistent { what: "language network".into() })?;
        let values = logits.floats().map_err(|what| RuntimeError::Inconsistent { what })?;
        self.tokens = best(values, logits.shape.last().copied().unwrap_or(0));
        Ok(self.tokens.clone())
    }
}

impl Executor for Reference {
    fn see(&mut self, pixels: &[f32], count: usize) -> Result<(), RuntimeError> {
        let vision = self.vision.as_ref().ok_or(RuntimeError::NoVision)?;
        let features = self.config.check_pictures(count)?;
        let config = &self.config.pretrained_config;
        let [height, width] = config.multimodal.ok_or(RuntimeError::NoVision)?.image_size;
        let channels = pixels.len() / (count * height * width).max(1);
        let pixels = Array::float([count, channels, height, width], pixels.to_vec());
        let mut caches = Caches::new(vision.network(), count, 0);
        self.outputs = vision.run(&BTreeMap::from([("input", pixels)]), &mut caches, None)?;
        let output = self.outputs.get("output");
        let output = output.ok_or_else(|| RuntimeError::Inconsistent { what: "vision network".into() })?;
        self.table = Array { shape: vec![count * features, config.hidden_size], data: output.data.clone() };
        Ok(())
    }

    fn prefill(&mut self, prompts: &[Vec<i32>]) -> Result<Vec<u32>, RuntimeError> {
        let sizes = self.config.build_config;
        check_prompts(&sizes, prompts)?;
        self.caches = Caches::new(self.language.network(), prompts.len(), sizes.max_seq_len);
        self.lengths = vec![0; prompts.len()];
        let tokens = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let padded = |prompt: &Vec<i32>| {
            let padding = tokens - prompt.len();
            prompt.iter().copied().chain(std::iter::repeat_n(0, padding)).collect::<Vec<_>>()
        };
        let ids = prompts.iter().flat_map(padded).collect();
        let used: Vec<i32> = prompts.iter().map(|prompt| prompt.len() as i32).collect();
        let batch = prompts.len();
        match &mut self.source {
            Some(source) => {
                source.read(Array::int([batch, tokens], ids), &used, self.table.clone())?;
                let start = vec![source.start_id; batch];
                let shown = source.shown.clone();
                let tokens = self.step(start, 1, &vec![1; batch], self.no_table())?;
                self.outputs.extend(shown);
                Ok(tokens)
            }
            None => self.step(ids, tokens, &used, self.table.clone()),
        }
    }

    /// One step at a time: none is made in vain.
    fn decode(&mut self, _limit: usize) -> Result<Vec<Vec<u32>>, RuntimeError> {
        self.config.room(self.lengths.iter().map(|&length| length as usize))?;
        let ids = self.tokens.iter().map(|&token| token as i32).collect();
        let used = vec![1; self.tokens.len()];
        Ok(vec![self.step(ids, 1, &used, self.no_table())?])
    }

    fn force(&mut self, tokens: &[u32]) -> Result<(), RuntimeError> {
        self.tokens = tokens.to_vec();
        Ok(())
    }

    fn outputs(&mut self) -> Result<BTreeMap<String, Output>, RuntimeError> {
        let output = |(name, array): (&String, &Array)| {
            let values = array.floats().map_err(|what| RuntimeError::Inconsistent { what })?.to_vec();
            Ok((name.clone(), Output { shape: array.shape.clone(), values }))
        };
        self.outputs.iter().map(output).collect()
    }
}
