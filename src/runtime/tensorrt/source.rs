//! What a decoder reads at every step beside its own tokens: keys and values of prompts that an encoder has read, or of
//! pictures. The engines hand them on in memory that they share.
use super::{Padded, RuntimeError};
use crate::device::{Buffer, Device};
use crate::engine_dir::EngineConfig;
use crate::runtime::tensorrt::loaded::Loaded;

/// Both engines have one optimization profile.
const ONLY: usize = 0;

pub(super) struct Source {
    pub(super) cross: Loaded,
    /// None where pictures are what is read.
    encoder: Option<Loaded>,
    /// What the decoder starts with.
    start_id: i32,
    /// Pictures whose features were put where an encoder's output would be.
    pub(super) seen: usize,
}

impl Source {
    pub(super) fn new(encoder: Option<Loaded>, cross: Loaded, config: &EngineConfig) -> Result<Source, RuntimeError> {
        let start = config.pretrained_config.decoder_start_token_id;
        let start = start.and_then(|id| i32::try_from(id).ok());
        let start_id = start.ok_or_else(|| RuntimeError::Inconsistent { what: "decoder_start_token_id".into() })?;
        Ok(Source { cross, encoder, start_id, seen: 0 })
    }

    /// Where features of pictures go.
    pub(super) fn pictures_mut(&mut self) -> Result<&mut Buffer, RuntimeError> {
        match &mut self.encoder {
            Some(encoder) => encoder.buffer_mut("prompt_embedding_table"),
            None => self.cross.buffer_mut("encoder_output"),
        }
    }

    /// What each request's decoder starts with.
    pub(super) fn start(&self, batch: usize) -> Padded {
        Padded { batch, tokens: 1, ids: vec![self.start_id; batch], used: vec![1; batch] }
    }

    /// Reads the prompts, or the pictures seen last, one for each; gives how many places there are.
    pub(super) fn read(
        &mut self,
        device: &Device,
        prompts: &Padded,
        config: &EngineConfig,
    ) -> Result<usize, RuntimeError> {
        let Padded { batch, tokens, ids, used } = prompts;
        let (batch, tokens) = (*batch, *tokens);
        let places = match &mut self.encoder {
            Some(encoder) => {
                let positions = (0..tokens as i32).collect::<Vec<_>>().repeat(batch);
                let rows = config.build_config.max_prompt_embedding_table_size.max(1);
                encoder.set_ints(device, ONLY, "input_ids", &[batch, tokens], ids)?;
                encoder.set_ints(device, ONLY, "position_ids", &[batch, tokens], &positions)?;
                encoder.set_ints(device, ONLY, "source_lengths", &[batch], used)?;
                let table = [rows, config.pretrained_config.hidden_size];
                encoder.set_shape(ONLY, "prompt_embedding_table", &table)?;
                tokens
            }
            None if self.seen == batch => {
                config.pretrained_config.multimodal.map_or(0, |seen| seen.num_visual_features)
            }
            None => return Err(RuntimeError::Inconsistent { what: format!("number of pictures ({})", self.seen) }),
        };
        self.cross.set_named(ONLY, "encoder_output", batch, places)?;
        self.enqueue(device)?;
        Ok(places)
    }

    /// Both engines with the inputs that they have, put on the stream.
    pub(super) fn enqueue(&self, device: &Device) -> Result<(), RuntimeError> {
        if let Some(encoder) = &self.encoder {
            encoder.enqueue(device, ONLY)?;
        }
        self.cross.enqueue(device, ONLY)
    }

    /// Engines whose results can be looked at.
    pub(super) fn engines(&self) -> impl Iterator<Item = &Loaded> {
        self.encoder.iter().chain([&self.cross])
    }
}
