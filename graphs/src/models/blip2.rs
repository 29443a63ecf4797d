//! BLIP-2: EVA's features through a Q-Former into a language model's prompt (Li et al. 2023, arXiv 2301.12597).
//! Names and semantics of `transformers/models/blip_2/modeling_blip_2.py`.
use super::{Alias, Aspect, Entry, Facts, Logits, PictureFacts};
use crate::config::Keys;
use crate::families::{eva::Eva, opt::Opt, qformer::Qformer, t5::T5};
use crate::{Axis, DType, Graph, GraphError, Network, Type};

/// What vocabularies are rounded up to.
const PADDING: usize = 64;

#[derive(Clone, Debug, PartialEq)]
pub struct Blip2 {
    pub vision: Eva,
    pub qformer: Qformer,
    pub language: Blip2Language,
    /// Query tokens: rows of the prompt table that one picture fills.
    pub queries: usize,
    /// Older files name none.
    image_token_id: Option<usize>,
}

/// What reads the picture's features.
#[derive(Clone, Debug, PartialEq)]
pub enum Blip2Language {
    Opt(Opt),
    T5(T5),
}

const PREFIX: &str = "language_model";

impl Blip2Language {
    fn from_config(keys: &Keys) -> Result<Blip2Language, GraphError> {
        match keys.text("model_type", "opt")? {
            "opt" => {
                let opt = Opt::from_config(keys)?;
                check(&opt, |key, reason| keys.fault(key, reason))?;
                Ok(Blip2Language::Opt(opt))
            }
            "t5" => Ok(Blip2Language::T5(T5::from_config(keys)?)),
            other => Err(keys.fault("model_type", format!("wanted `opt` or `t5`, found `{other}`"))),
        }
    }

    fn networks(&self, dtype: DType, logits: Logits) -> Result<Vec<Network>, GraphError> {
        match self {
            Blip2Language::Opt(opt) => {
                let graph = Graph::new("language", dtype);
                opt.write(&graph, &graph.scope(PREFIX), true, logits);
                Ok(vec![graph.finish()?])
            }
            Blip2Language::T5(t5) => t5.networks(dtype, PREFIX, true, logits),
        }
    }

    pub(super) fn facts(&self) -> Facts {
        match self {
            Blip2Language::Opt(opt) => opt.facts(),
            Blip2Language::T5(t5) => t5.facts(),
        }
    }

    /// Whether the head repeats the embedding and may lie in the file all the same.
    pub(super) fn tied(&self) -> bool {
        matches!(self, Blip2Language::Opt(opt) if opt.tied)
    }

    pub(super) fn aliases(&self) -> &'static [Alias] {
        match self {
            Blip2Language::Opt(_) => &[],
            Blip2Language::T5(_) => &[
                ("language_model.lm_head.", "language_model.shared."),
                ("language_model.shared.", "language_model.encoder.embed_tokens."),
                ("language_model.shared.", "language_model.decoder.embed_tokens."),
            ],
        }
    }
}

impl Blip2 {
    pub(super) fn from_config(keys: &Keys) -> Result<Blip2, GraphError> {
        let text_keys = keys.object("text_config")?;
        let (vision, qformer_keys) =
            (Eva::from_config(&keys.object("vision_config")?)?, keys.object("qformer_config")?);
        let qformer = Qformer::from_config(&qformer_keys)?;
        if qformer.picture != vision.vit.hidden {
            let reason =
                format!("{} differs from the vision network's hidden_size {}", qformer.picture, vision.vit.hidden);
            return Err(qformer_keys.fault("encoder_hidden_size", reason));
        }
        let language = Blip2Language::from_config(&text_keys)?;
        let image_token_id = match keys.size("image_token_index", keys.size("image_token_id", 0)?)? {
            0 => None,
            id => Some(id),
        };
        Ok(Blip2 { vision, qformer, language, queries: keys.size("num_query_tokens", 32)?, image_token_id })
    }

    /// With the language part of another checkpoint. Vocabularies may differ by padding: the hub's BLIP-2 holds more rows
    /// than the OPT that it was made of.
    pub(super) fn with_language(self, language: Blip2Language) -> Result<Blip2, GraphError> {
        let fault = |key: &str, reason| GraphError::Config { key: key.into(), reason };
        if let Blip2Language::Opt(opt) = &language {
            check(opt, fault)?;
        }
        let (own, other) = (self.language.facts(), language.facts());
        if own.model_type != other.model_type {
            let reason =
                format!("the pictures are for `{}`, the language model is `{}`", own.model_type, other.model_type);
            return Err(fault("model_type", reason));
        }
        if other.hidden != own.hidden {
            let reason = format!("the pictures come as {}, the language model has {}", own.hidden, other.hidden);
            return Err(fault("hidden_size", reason));
        }
        let padded = |vocab: usize| vocab.next_multiple_of(PADDING);
        if padded(other.vocab) != padded(own.vocab) {
            let reason = format!("the tokens are of {}, the language model has {}", own.vocab, other.vocab);
            return Err(fault("vocab_size", reason));
        }
        Ok(Blip2 { language, ..self })
    }

    /// Pixels in, rows of the prompt table out.
    ///
    /// Input `input` `[batch, 3, image_size, image_size]`, output `output` `[batch, queries, hidden]`, as wide as the
    /// language model.
    fn vision(&self, dtype: DType) -> Result<Network, GraphError> {
        let graph = Graph::new("vision", dtype);
        let root = graph.scope("");
        let size = self.vision.vit.image_size.into();
        let pixels =
            graph.input("input", Type::new(dtype, [Axis::Batch.into(), self.vision.vit.channels.into(), size, size]));
        let picture = self.vision.write(&root.sub("vision_model"), pixels);
        let queries = root.broadcast("query_tokens", &[1, self.queries, self.qformer.hidden], picture);
        let queries = queries.reshape([Axis::Batch.into(), self.queries.into(), self.qformer.hidden.into()]);
        let seen = self.qformer.write(&root.sub("qformer"), queries, picture);
        graph.output("output", root.linear("language_projection", self.language.facts().hidden).bias().of(seen));
        graph.finish()
    }

    pub(super) fn networks(&self, dtype: DType, logits: Logits) -> Result<Vec<Network>, GraphError> {
        let mut networks = vec![self.vision(dtype)?];
        networks.extend(self.language.networks(dtype, logits)?);
        Ok(networks)
    }

    pub(super) fn picture_facts(&self) -> PictureFacts {
        let size = self.vision.vit.image_size;
        PictureFacts {
            token_id: self.image_token_id,
            features: self.queries,
            size: [size, size],
            aspect: Aspect::Processor,
            entry: Entry::Prompt,
        }
    }

    pub(super) fn ignores(name: &str) -> bool {
        name.strip_prefix("qformer.").is_some_and(Qformer::ignores)
            || (name.starts_with("language_model.") && T5::ignores(name))
    }
}

/// Pictures enter as embeddings, which must be as wide as they.
fn check(language: &Opt, fault: impl Fn(&str, String) -> GraphError) -> Result<(), GraphError> {
    let Opt { embedding, hidden, .. } = *language;
    match embedding == hidden {
        true => Ok(()),
        false => Err(fault("word_embed_proj_dim", format!("{embedding}, but pictures come in hidden_size {hidden}"))),
    }
}
