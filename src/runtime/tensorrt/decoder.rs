//! The engine with the caches: a prompt in, then steps that are a recorded graph ending with its own next inputs.
use super::{INT, Padded, RuntimeError};
use crate::device::{Buffer, Device};
use crate::engine_dir::EngineConfig;
use crate::lower::{NEXT_LENGTHS, NEXT_TOKENS};
use crate::plugins::Communicator;
use crate::runtime::tensorrt::loaded::Loaded;
use cudarc::driver::CudaGraph;

/// Decode steps between two looks at their tokens.
pub(super) const STRIDE: usize = 8;

/// The optimization profile that reads prompts.
pub(super) const PREFILL: usize = 0;

pub(super) struct Decoder {
    graph: Option<CudaGraph>,
    pub(super) engine: Loaded,
    /// The optimization profile of steps: the last, and the only one where an encoder reads the prompts.
    decode: usize,
    /// Tokens of each request that lie in the caches.
    pub(super) lengths: Vec<usize>,
    /// Places of the encoder's output that the recorded graph reads.
    source: usize,
    /// Tokens of the steps since the host last looked, int32 `[STRIDE, batch]`.
    history: Buffer,
}

impl Decoder {
    pub(super) fn new(device: &Device, engine: Loaded, config: &EngineConfig) -> Result<Decoder, RuntimeError> {
        let decode = engine.profiles().saturating_sub(1);
        // Every new token's position is the number of tokens before it.
        if engine.has("position_ids") {
            engine.bind(device, decode, "position_ids", "past_lengths")?;
        }
        let history = device.allocate(STRIDE * config.build_config.max_batch_size * INT)?;
        Ok(Decoder { graph: None, engine, decode, lengths: Vec::new(), source: 0, history })
    }

    pub(super) fn decode_profile(&self) -> usize {
        self.decode
    }

    /// Prompts in the caches and the first new tokens, put on the stream. `read` says how many tokens of each request
    /// an encoder has read.
    pub(super) fn start(
        &mut self,
        device: &Device,
        prompts: &Padded,
        read: Option<&[i32]>,
        source: usize,
        config: &EngineConfig,
    ) -> Result<(), RuntimeError> {
        let Padded { batch, tokens, ids, used } = prompts;
        let (batch, tokens) = (*batch, *tokens);
        let positions: Vec<i32> = (0..batch).flat_map(|_| 0..tokens as i32).collect();
        let last: Vec<i32> = used.iter().map(|used| used - 1).collect();
        let (engine, decode) = (&mut self.engine, self.decode);
        engine.set_ints(device, PREFILL, "input_ids", &[batch, tokens], ids)?;
        engine.set_ints(device, PREFILL, "position_ids", &[batch, tokens], &positions)?;
        engine.set_ints(device, PREFILL, "past_lengths", &[batch], &vec![0; batch])?;
        engine.set_ints(device, PREFILL, "sequence_lengths", &[batch], used)?;
        engine.set_ints(device, PREFILL, "last_token_ids", &[batch], &last)?;
        if let Some(read) = read {
            engine.set_ints(device, PREFILL, "source_lengths", &[batch], read)?;
        }
        let rows = config.build_config.max_prompt_embedding_table_size.max(1);
        let hidden = config.pretrained_config.hidden_size;
        engine.set_shape(PREFILL, "prompt_embedding_table", &[rows, hidden])?;
        engine.set_named(PREFILL, "past_", batch, 1)?;
        engine.set_named(PREFILL, "cross_", batch, source)?;
        engine.enqueue(device, PREFILL)?;
        // What comes after has one token a request, the last of one.
        engine.set_ints(device, decode, "last_token_ids", &[batch], &vec![0; batch])?;
        engine.set_shape(decode, "input_ids", &[batch, 1])?;
        engine.set_shape(decode, "position_ids", &[batch, 1])?;
        engine.set_shape(decode, "past_lengths", &[batch])?;
        engine.set_shape(decode, "sequence_lengths", &[batch])?;
        engine.set_shape(decode, "prompt_embedding_table", &[1, hidden])?;
        engine.set_named(decode, "past_", batch, 1)?;
        engine.set_named(decode, "cross_", batch, source)?;
        // A recording holds the sizes of what it reads.
        if self.lengths.len() != batch || self.source != source {
            self.graph = None;
        }
        self.source = source;
        self.lengths = used.iter().map(|&used| used as usize).collect();
        advance(device, &mut self.engine, batch * INT)
    }

    /// Steps put on the stream: the first of a batch is run as it is, and the others are replays of its recording.
    ///
    /// Ranks meet before each replay, whose kernels wait for those of the others: then all have their recordings, and no
    /// copy of one rank's step lies in a queue before a copy that it waits for.
    pub(super) fn steps(
        &mut self,
        device: &Device,
        count: usize,
        communicator: Option<&Communicator>,
    ) -> Result<(), RuntimeError> {
        let bytes = self.lengths.len() * INT;
        for place in 0..count {
            match self.graph.take() {
                Some(graph) => {
                    communicator.map_or(Ok(()), Communicator::meet).map_err(RuntimeError::Ranks)?;
                    device.replay(&graph)?;
                    self.graph = Some(graph);
                }
                None => {
                    let (engine, decode) = (&mut self.engine, self.decode);
                    step(device, engine, decode, bytes)?;
                    device.wait()?;
                    self.graph = Some(device.record(|| step(device, engine, decode, bytes))?);
                }
            }
            let tokens = self.engine.buffer(NEXT_TOKENS)?;
            device.copy(tokens, &mut self.history, place % STRIDE * bytes, bytes)?;
        }
        self.lengths.iter_mut().for_each(|length| *length += count);
        Ok(())
    }

    /// The tokens of the last steps, at most [`STRIDE`] of them.
    pub(super) fn made(&self, device: &Device, steps: usize) -> Result<Vec<Vec<u32>>, RuntimeError> {
        self.tokens(device, &self.history, steps)
    }

    /// The tokens that follow the prompts.
    pub(super) fn first(&self, device: &Device) -> Result<Vec<u32>, RuntimeError> {
        let tokens = self.tokens(device, self.engine.buffer(NEXT_TOKENS)?, 1)?;
        Ok(tokens.into_iter().next().unwrap_or_default())
    }

    fn tokens(&self, device: &Device, buffer: &Buffer, steps: usize) -> Result<Vec<Vec<u32>>, RuntimeError> {
        let batch = self.lengths.len();
        let bytes = device.download(buffer, steps * batch * INT)?;
        let tokens: Vec<u32> = bytes.as_chunks::<INT>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        Ok(tokens.chunks(batch.max(1)).map(<[u32]>::to_vec).collect())
    }
}

/// One decode step, put on the stream.
fn step(device: &Device, engine: &mut Loaded, profile: usize, bytes: usize) -> Result<(), RuntimeError> {
    engine.enqueue(device, profile)?;
    advance(device, engine, bytes)
}

/// Puts the next inputs, `bytes` each, in place of the last ones: tokens, rows of the caches before and after.
fn advance(device: &Device, engine: &mut Loaded, bytes: usize) -> Result<(), RuntimeError> {
    engine.copy(device, NEXT_TOKENS, "input_ids", bytes)?;
    engine.copy(device, "sequence_lengths", "past_lengths", bytes)?;
    engine.copy(device, NEXT_LENGTHS, "sequence_lengths", bytes)
}
