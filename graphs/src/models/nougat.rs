//! Nougat: Donut's Swin reads a page, mBART's decoder writes it down (Blecher et al. 2023, arXiv 2308.13418).
//! Names and semantics of `transformers/models/vision_encoder_decoder/modeling_vision_encoder_decoder.py`.
use super::{Alias, Aspect, Entry, Facts, Logits, PictureFacts};
use crate::config::Keys;
use crate::families::{donut_swin::DonutSwin, mbart::Mbart};
use crate::{Axis, DType, Graph, GraphError, Network, Type};

#[derive(Clone, Debug, PartialEq)]
pub struct Nougat {
    pub vision: DonutSwin,
    pub language: Mbart,
}

const PREFIX: &str = "decoder";

/// A file without a head has it in the embedding.
pub(super) const ALIASES: &[Alias] = &[("decoder.lm_head.", "decoder.model.decoder.embed_tokens.")];

impl Nougat {
    pub(super) fn from_config(keys: &Keys) -> Result<Nougat, GraphError> {
        let [encoder, decoder] = [("encoder", "donut-swin"), ("decoder", "mbart")].map(|(key, wanted)| {
            let part = keys.object(key)?;
            match part.text("model_type", "")? {
                found if found == wanted => Ok(part),
                found => Err(part.fault("model_type", format!("wanted `{wanted}`, found `{found}`"))),
            }
        });
        let (encoder, decoder) = (encoder?, decoder?);
        let start_id = Mbart::start_id(keys, &decoder)?;
        let language = Mbart { start_id, ..Mbart::from_config(&decoder, false)? };
        Ok(Nougat { vision: DonutSwin::from_config(&encoder)?, language })
    }

    /// `vision`: pixels `input` `[batch, channels, height, width]` to `output` `[batch, features, hidden]`, as wide as the
    /// decoder; then `cross` and `decoder` as mBART has them, for exactly so many features.
    pub(super) fn networks(&self, dtype: DType, logits: Logits) -> Result<Vec<Network>, GraphError> {
        let (features, _) = self.vision.output();
        Ok(vec![
            self.vision(dtype)?,
            self.language.cross(dtype, PREFIX, features.into())?,
            self.language.decoder(dtype, PREFIX, features.into(), logits)?,
        ])
    }

    fn vision(&self, dtype: DType) -> Result<Network, GraphError> {
        let graph = Graph::new("vision", dtype);
        let root = graph.scope("");
        let [height, width] = self.vision.image_size.map(Into::into);
        let pixels = [Axis::Batch.into(), self.vision.channels.into(), height, width];
        let mut x = self.vision.write(&root.sub("encoder"), graph.input("input", Type::new(dtype, pixels)));
        let (_, found) = self.vision.output();
        if found != self.language.hidden {
            x = root.linear("enc_to_dec_proj", self.language.hidden).bias().of(x);
        }
        graph.output("output", x);
        graph.finish()
    }

    pub(super) fn facts(&self) -> Facts {
        let pictures = PictureFacts {
            token_id: None,
            features: self.vision.output().0,
            size: self.vision.image_size,
            aspect: Aspect::Processor,
            entry: Entry::Source,
        };
        Facts {
            architecture: "VisionEncoderDecoderModel",
            model_type: "vision-encoder-decoder",
            decoder_start_id: Some(self.language.start_id),
            pictures: Some(pictures),
            ..self.language.facts()
        }
    }
}
