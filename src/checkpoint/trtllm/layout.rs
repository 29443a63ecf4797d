//! Where TensorRT-LLM keeps which tensor: one table for each family, read by `build` and written by `convert`.
//!
//! Names, fusions and splits of LLaMA are what NVIDIA's exporter wrote (`tests/trtllm.rs` compares bit by bit). Those of OPT,
//! T5 and mBART follow TensorRT-LLM's own converters (`examples/opt/convert_checkpoint.py` and
//! `examples/enc_dec/convert_checkpoint.py` of NVIDIA/TensorRT-LLM, read, never run here).
use super::{decoders, encoders};
use graphs::Model;
use graphs::families::{llama::Llama, mbart::Mbart, opt::Opt, t5::T5};
use graphs::models::Blip2Language;
use std::ops::Range;

/// The language part of a model, if TensorRT-LLM's format has a place for it.
#[derive(Clone, Copy)]
pub(crate) enum Family<'m> {
    Llama(&'m Llama),
    Opt(&'m Opt),
    T5(&'m T5),
    Mbart(&'m Mbart),
}

impl<'m> Family<'m> {
    pub(crate) fn of(model: &'m Model) -> Option<Family<'m>> {
        Some(match model {
            Model::Llama(llama) => Family::Llama(llama),
            Model::Llava(llava) => Family::Llama(&llava.language),
            Model::Vila(vila) => Family::Llama(&vila.language),
            Model::Opt(opt) => Family::Opt(opt),
            Model::T5(t5) => Family::T5(t5),
            Model::Blip2(blip2) => match &blip2.language {
                Blip2Language::Opt(opt) => Family::Opt(opt),
                Blip2Language::T5(t5) => Family::T5(t5),
            },
            Model::Mbart(mbart) if mbart.encoder.is_some() => Family::Mbart(mbart),
            Model::Mbart(_) | Model::Nougat(_) => return None,
        })
    }

    /// The folders of a checkpoint with the tensors of each; the empty name is the checkpoint's own.
    pub(crate) fn groups(self, embedding: Split) -> Vec<Group> {
        match self {
            Family::Llama(llama) => vec![Group { folder: "", fields: decoders::llama(llama, embedding) }],
            Family::Opt(opt) => vec![Group { folder: "", fields: decoders::opt(opt, embedding) }],
            Family::T5(t5) => vec![
                Group { folder: ENCODER, fields: encoders::t5_encoder(t5, embedding) },
                Group { folder: DECODER, fields: encoders::t5_decoder(t5, embedding) },
            ],
            Family::Mbart(mbart) => vec![
                Group { folder: ENCODER, fields: encoders::mbart_encoder(mbart, embedding) },
                Group { folder: DECODER, fields: encoders::mbart_decoder(mbart, embedding) },
            ],
        }
    }
}

pub(crate) const ENCODER: &str = "encoder";
pub(crate) const DECODER: &str = "decoder";

/// The tensors of one folder's rank files.
pub(crate) struct Group {
    pub(crate) folder: &'static str,
    pub(crate) fields: Vec<Field>,
}

/// How ranks share a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Split {
    /// Every rank has all of it, and it belongs to every part.
    Whole,
    /// A rank has some rows of each part, part after part.
    Rows,
    /// Equally many columns each.
    Columns,
    /// Equally many rows each, filled up with zeros behind the last.
    Words,
}

/// What else is different in a rank's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Same,
    /// So many rows at the start are missing there.
    Tail(usize),
    /// Rows are columns there.
    Turned,
    /// `[n]` there, `[1, n]` in Hugging Face's.
    Flat,
}

/// A Hugging Face tensor by its canonical name, its rows in units that stay on one rank.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Part {
    pub(crate) name: String,
    /// Heads or single rows.
    pub(crate) units: usize,
    /// Rows of each.
    pub(crate) unit: usize,
}

impl Part {
    pub(crate) fn rows(&self) -> usize {
        self.units * self.unit
    }

    /// The rows that a rank has: its share, or with fewer units than ranks one unit, which others have too. None where ranks
    /// do not share alike.
    pub(crate) fn range(&self, rank: usize, ranks: usize) -> Option<Range<usize>> {
        if self.units >= ranks {
            let share = self.rows() / ranks;
            return self.units.is_multiple_of(ranks).then_some(rank * share..(rank + 1) * share);
        }
        let unit = rank * self.units / ranks;
        (self.units > 0 && ranks.is_multiple_of(self.units)).then_some(unit * self.unit..(unit + 1) * self.unit)
    }

    /// The same rows of another tensor: `ending` in the place of `.weight`.
    pub(crate) fn beside(&self, ending: &str) -> Part {
        let stem = self.name.strip_suffix(".weight").unwrap_or(&self.name);
        Part { name: format!("{stem}{ending}"), ..self.clone() }
    }
}

/// A tensor of a rank's file and the tensors that it is made of. It is there where those are.
#[derive(Clone, Debug)]
pub(crate) struct Field {
    pub(crate) name: String,
    pub(crate) parts: Vec<Part>,
    pub(crate) split: Split,
    pub(crate) form: Form,
    /// Another field has the same.
    pub(crate) copy: bool,
    /// The matrix of a linear layer, which may be quantized.
    pub(crate) linear: bool,
}

/// The ending of names of scales, of what multiplies inputs, and of the scale of inputs.
pub(crate) const SCALE: &str = "weights_scaling_factor";
pub(crate) const PRESCALE: &str = "prequant_scaling_factor";
pub(crate) const ACTIVATION: &str = "activation_scaling_factor";

/// What a quantized layer has besides its matrix: its parts are named as in NVIDIA's unified layout. `scale` is the shape of
/// the scales, `inputs` how many inputs are scaled first, `activation` whether inputs are rounded.
pub(crate) fn extras(field: &Field, scale: Option<&[usize]>, inputs: Option<usize>, activation: bool) -> Vec<Field> {
    let Some(stem) = field.name.strip_suffix(".weight") else { return Vec::new() };
    let column = field.split == Split::Rows;
    let extra = |name: &str, ending: &str, split: Split, rows: Option<usize>| {
        let parts = field.parts.iter().map(|part| {
            let part = part.beside(ending);
            rows.map_or(part.clone(), |units| Part { units, unit: 1, ..part })
        });
        let (parts, name) = (parts.collect(), format!("{stem}.{name}"));
        Field { name, parts, split, form: Form::Same, copy: false, linear: false }
    };
    let split = scale.map(|shape| match (column, shape.len()) {
        _ if shape.iter().product::<usize>() == 1 => Split::Whole,
        (true, _) => Split::Rows,
        (false, 2) => Split::Columns,
        (false, _) => Split::Whole,
    });
    let prescale = inputs.map(|inputs| if column { (Split::Whole, None) } else { (Split::Rows, Some(inputs)) });
    let scale = split.map(|split| extra(SCALE, ".weight_scale", split, None));
    let prescale = prescale.map(|(split, rows)| extra(PRESCALE, ".pre_quant_scale", split, rows));
    let activation = activation.then(|| extra(ACTIVATION, ".input_scale", Split::Whole, None));
    [scale, prescale, activation].into_iter().flatten().collect()
}

/// Fields as they are written down, those of one scope under another.
#[derive(Default)]
pub(super) struct Table {
    pub(super) fields: Vec<Field>,
}

impl Table {
    fn push(&mut self, name: String, parts: Vec<Part>, split: Split, form: Form) -> &mut Field {
        self.fields.push(Field { name, parts, split, form, copy: false, linear: false });
        let last = self.fields.len() - 1;
        &mut self.fields[last]
    }

    /// A tensor of `rows` rows.
    pub(super) fn tensor(&mut self, name: &str, from: &str, rows: usize, split: Split, form: Form) -> &mut Field {
        let part = Part { name: from.into(), units: rows, unit: 1 };
        self.push(name.into(), vec![part], split, form)
    }

    /// Weight and bias of a norm.
    pub(super) fn norm(&mut self, name: &str, from: &str) {
        for part in ["weight", "bias"] {
            self.tensor(&format!("{name}.{part}"), &format!("{from}.{part}"), 0, Split::Whole, Form::Same);
        }
    }

    /// A layer whose outputs are divided, made of several: each with its units and the rows of one.
    pub(super) fn column(&mut self, name: &str, from: &[(String, usize, usize)]) {
        for ending in ["weight", "bias"] {
            let part = |(stem, units, unit): &(String, usize, usize)| Part {
                name: format!("{stem}.{ending}"),
                units: *units,
                unit: *unit,
            };
            let parts = from.iter().map(part).collect();
            self.push(format!("{name}.{ending}"), parts, Split::Rows, Form::Same).linear = ending == "weight";
        }
    }

    /// A layer whose inputs are divided; its bias is added once, and every rank's file has all of it.
    pub(super) fn row(&mut self, name: &str, from: &str) {
        let weight = self.tensor(&format!("{name}.weight"), &format!("{from}.weight"), 0, Split::Columns, Form::Same);
        weight.linear = true;
        self.tensor(&format!("{name}.bias"), &format!("{from}.bias"), 0, Split::Whole, Form::Same);
    }
}

#[cfg(test)]
mod tests {
    use super::Part;

    #[test]
    fn units_are_shared_alike_or_not_at_all() {
        let part = |units| Part { name: String::new(), units, unit: 16 };
        let ranges = |units, ranks| (0..ranks).map(|rank| part(units).range(rank, ranks)).collect::<Option<Vec<_>>>();
        assert_eq!(ranges(4, 2).unwrap(), [0..32, 32..64]);
        assert_eq!(ranges(2, 4).unwrap(), [0..16, 0..16, 16..32, 16..32]);
        assert_eq!(ranges(1, 3).unwrap(), [0..16, 0..16, 0..16]);
        assert_eq!((ranges(3, 2), ranges(2, 3), ranges(0, 2)), (None, None, None));
    }
}
