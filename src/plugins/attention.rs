//! Attention over an in-place key/value cache, rotary positions included: `attention.cu` as a TensorRT layer.
//!
//! Inputs: query `[batch, tokens, heads * head_dim]`, key and value `[batch, tokens, kv_heads * head_dim]`, key and value
//! cache `[batch, kv_heads, rows, head_dim]` or int8 `[batch, kv_heads, rows, bytes of a row]`, past and sequence lengths int32 `[batch]`; with rotary positions then
//! position ids int32 `[batch, tokens]` and the table float32 `[rows, head_dim / 2, 2]` of cosines and sines; with a bias
//! last a table float32 `[heads, rows]` of what is added to the score of a key so many rows before the query's own.
//! Outputs: the mix, of the query's shape, and the two caches, changed in place.
use super::kernel::{Compiler, Kernels, Launch};
use super::nvrtc::CompileError;
use crate::lower::data_type;
use graphs::{DType, int8_row};
use serde::{Deserialize, Serialize};
use std::ffi::{CStr, c_void};
use tensorrt_sys::{DataType, Plugin, PluginCall, PluginOutput, PluginTensor, Signature};

const SOURCE: &str = concat!(include_str!("attention.cu"), include_str!("attention_tiles.cu"));

/// As in the source: cache rows of one block, warps of a block, queries of a block and keys of a step of the
/// plain kernel, queries of a block of the one on tensor cores.
const CHUNK: usize = 64;
const WARPS: usize = 4;
const QUERIES: usize = 16;
const KEYS: usize = 32;
const TILE_QUERIES: usize = 64;

/// Up to as many tokens a request the keys are split over blocks: there are too few queries to fill a GPU.
const FEW_TOKENS: usize = 4;

/// The largest head whose tiles fit into the shared memory of every GPU from sm80 on.
pub const LARGEST_HEAD: usize = 256;

/// Everything that is compiled into the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionShape {
    pub dtype: DType,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    pub rotary: bool,
    pub causal: bool,
    /// A bias by distance is added to the scores.
    pub bias: bool,
    /// The caches hold INT8 rows. Left out where they do not, as in engines of before.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub int8_cache: bool,
}

impl AttentionShape {
    /// Whether the kernel on tensor cores takes it, as the source decides.
    fn tiled(&self) -> bool {
        self.dtype != DType::Float32 && self.head_dim.is_multiple_of(16) && self.head_dim <= 128
    }

    fn options(&self) -> Vec<String> {
        let kind = match self.dtype {
            DType::Float16 => 1,
            DType::Bfloat16 => 2,
            _ => 0,
        };
        let row = self.int8_cache.then(|| format!("-DINT8_ROW={}", int8_row::stored_bytes(self.head_dim)));
        let options = [
            format!("-DTYPE={kind}"),
            format!("-DHEADS={}", self.heads),
            format!("-DKV_HEADS={}", self.kv_heads),
            format!("-DHEAD_DIM={}", self.head_dim),
            format!("-DSCALE={:e}f", self.scale),
            format!("-DROTARY={}", u8::from(self.rotary)),
            format!("-DCAUSAL={}", u8::from(self.causal)),
            format!("-DBIAS={}", u8::from(self.bias)),
        ];
        options.into_iter().chain(row).collect()
    }

    /// Threads of a block that appends one token: one for each element, or a warp for each head's key and its value.
    fn appending(&self) -> usize {
        let wanted = if self.int8_cache { 2 * self.kv_heads * 32 } else { self.kv_heads * self.head_dim };
        wanted.next_multiple_of(32).min(512)
    }
}

pub struct AttentionPlugin {
    shape: AttentionShape,
    kernels: Kernels,
}

impl AttentionPlugin {
    pub const NAME: &'static CStr = c"TrtvlmAttention";
    pub const KERNELS: [&'static str; 4] = ["append", "attend_part", "attend_join", "attend_all"];
    /// Only where [`AttentionShape`] suits tensor cores.
    pub const TILES: &'static str = "attend_tiles";

    /// # Errors
    /// The compiler's log.
    pub fn new(shape: AttentionShape, compiler: &Compiler) -> Result<AttentionPlugin, CompileError> {
        let code = compiler.compile("attention.cu", SOURCE, shape.options())?;
        Ok(AttentionPlugin { shape, kernels: Kernels::new(code) })
    }

    pub(super) fn create(state: &[u8]) -> Result<Box<dyn Plugin>, String> {
        let (shape, kernels) = Kernels::restore(state)?;
        Ok(Box::new(AttentionPlugin { shape, kernels }))
    }
}

impl Plugin for AttentionPlugin {
    fn name(&self) -> &'static CStr {
        AttentionPlugin::NAME
    }

    fn signature(&self) -> Signature {
        let (own, int) = (data_type(self.shape.dtype), DataType::Int32);
        let rotary = [int, DataType::Float];
        let rotary = if self.shape.rotary { &rotary[..] } else { &[] };
        let bias = if self.shape.bias { &[DataType::Float][..] } else { &[] };
        let kept = if self.shape.int8_cache { DataType::Int8 } else { own };
        let output = |dtype, like, in_place| PluginOutput { dtype, like, in_place };
        Signature {
            inputs: [&[own, own, own, kept, kept][..], &[int; 2], rotary, bias].concat(),
            outputs: vec![output(own, 0, false), output(kept, 3, true), output(kept, 4, true)],
        }
    }

    fn state(&self) -> Vec<u8> {
        self.kernels.store(&self.shape)
    }

    /// Parts of the mix with their maxima and sums.
    fn workspace(&self, inputs: &[Vec<i64>]) -> usize {
        let Some(Sizes { batch, tokens, rows }) = sizes(inputs.iter().map(Vec::as_slice)) else { return 0 };
        let parts = batch * tokens.min(FEW_TOKENS) * self.shape.heads * rows.div_ceil(CHUNK);
        parts * (self.shape.head_dim + 2) * size_of::<f32>()
    }

    fn enqueue(&self, call: &PluginCall<'_>) -> Result<(), String> {
        let AttentionShape { heads, head_dim, .. } = self.shape;
        let [append, attend_part, attend_join, attend_all] = AttentionPlugin::KERNELS;
        let Sizes { batch, tokens, rows } =
            sizes(call.inputs.iter().map(|input| input.shape.as_slice())).ok_or("its inputs have other shapes")?;
        let [query, key, value, key_cache, value_cache, past, sequence, tables @ ..] = call.inputs else {
            return Err("it has other inputs".into());
        };
        let (rotary, bias) = tables.split_at_checked(2 * usize::from(self.shape.rotary)).unwrap_or_default();
        // Every distance that can be asked for has its place in the table, or memory behind it would be read.
        if bias.iter().any(|bias| bias.shape != [heads as i64, rows as i64]) {
            return Err("its bias has another shape".into());
        }
        let address = |input: Option<&PluginTensor>| input.map_or(0, |input| input.address);
        let [mut query, mut key, mut value, key_cache, value_cache, mut past, mut sequence] =
            [query, key, value, key_cache, value_cache, past, sequence].map(|input| input.address);
        let (mut positions, mut table) = (address(rotary.first()), address(rotary.get(1)));
        let mut bias = address(bias.first());
        let [mix, new_keys, new_values] = call.outputs else { return Err("it has other outputs".into()) };
        // Everything rests on it: a copy of the cache would be changed, and lost.
        if new_keys.address != key_cache || new_values.address != value_cache {
            return Err("the cache was copied instead of changed in place".into());
        }
        let (mut keys, mut values) = (key_cache, value_cache);
        let PluginTensor { address: mut mix, .. } = mix.clone();
        let (mut workspace, mut token_count, mut row_count) = (call.workspace, tokens as i32, rows as i32);
        macro_rules! launch {
            ($name:expr, $grid:expr, $threads:expr, $shared:expr, [$($argument:ident),*]) => {{
                let launch = Launch { grid: $grid, threads: $threads as u32, shared: $shared };
                let arguments = &mut [$((&raw mut $argument).cast::<c_void>()),*];
                // SAFETY: the arguments are those of the kernel in attention.cu; shapes were checked by TensorRT
                // against the signature, and sizes are taken from them.
                unsafe { self.kernels.launch($name, launch, call.stream, arguments) }
            }};
        }
        launch!(
            append,
            [tokens, batch, 1],
            self.shape.appending(),
            0,
            [key, value, keys, values, positions, past, sequence, table, token_count, row_count]
        )?;
        if tokens <= FEW_TOKENS {
            let splits = rows.div_ceil(CHUNK);
            let mut split_count = splits as i32;
            launch!(
                attend_part,
                [splits, heads, batch * tokens],
                WARPS * 32,
                0,
                [query, keys, values, positions, past, sequence, table, bias, workspace, token_count, row_count]
            )?;
            launch!(
                attend_join,
                [heads, batch * tokens, 1],
                head_dim.next_multiple_of(32).min(256),
                0,
                [workspace, mix, past, sequence, token_count, row_count, split_count]
            )
        } else if self.shape.tiled() {
            launch!(
                AttentionPlugin::TILES,
                [tokens.div_ceil(TILE_QUERIES), heads, batch],
                WARPS * 32,
                0,
                [query, keys, values, positions, past, sequence, table, bias, mix, token_count, row_count]
            )
        } else {
            let width = head_dim.next_multiple_of(4);
            let shared = (QUERIES * width + 2 * KEYS * (width + 4)) * size_of::<f32>();
            launch!(
                attend_all,
                [tokens.div_ceil(QUERIES), heads, batch],
                WARPS * 32,
                shared,
                [query, keys, values, positions, past, sequence, table, bias, mix, token_count, row_count]
            )
        }
    }
}

struct Sizes {
    batch: usize,
    tokens: usize,
    rows: usize,
}

/// From the shapes of the query and the key cache.
fn sizes<'s>(mut inputs: impl Iterator<Item = &'s [i64]>) -> Option<Sizes> {
    let &[batch, tokens, _] = inputs.next()? else { return None };
    let &[_, _, rows, _] = inputs.nth(2)? else { return None };
    let size = |size: i64| usize::try_from(size).ok();
    Some(Sizes { batch: size(batch)?, tokens: size(tokens)?, rows: size(rows)? })
}
