//! LoRA in blocks that share one factor ("One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot Learning", arXiv
//! 2501.16720). Written from the abstract and published summaries; no code of the authors was found.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Factors, Method, Structure};

/// `y = x W + scale (x A) (B_1 + ... + B_n)`: one head, n arms.
///
/// Arms that start equal stay equal: with the zero start this is LoRA of rank `r / n` with n times the learning rate
/// for B.
#[derive(Module, Debug)]
pub struct BlockLora {
    /// The head `[d_in, rank / blocks]`.
    pub a: Param<Tensor<2>>,
    /// The arms `[blocks, d_out, rank / blocks]`, zero at the start.
    pub b: Param<Tensor<3>>,
    #[module(skip)]
    scale: f64,
}

/// Options of [`BlockLora`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct BlockLoraOptions {
    /// Number of arms; divides the rank.
    #[schemars(range(min = 1))]
    pub blocks: usize,
}

impl Default for BlockLoraOptions {
    fn default() -> Self {
        Self { blocks: 8 }
    }
}

impl BlockLora {
    /// Sum of the arms `[rank / blocks, d_out]`.
    fn arms(&self) -> Tensor<2> {
        self.b.val().sum_dim(0).squeeze_dim::<2>(0).transpose()
    }
}

impl Structure for BlockLora {
    fn factors(&self) -> Option<Factors> {
        Some(Factors { a: self.a.val(), b: self.arms(), scale: self.scale })
    }
}

impl Method for BlockLora {
    type Options = BlockLoraOptions;

    const SPEC: Spec = Spec {
        name: "block-lora",
        title: "One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot Learning",
        arxiv: "2501.16720",
        summary: "LoRA in blocks that share one factor",
        trains: "d_out r + d_in r / blocks",
        stores: "",
        dense_forward: false,
        rank: Rank::Fixed(8),
        alpha: Alpha::Fixed(1.0),
        scaling: Scaling::RootRank,
        inits: &[],
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "a", role: TensorRole::A, transposed: true },
            TensorSpec { name: "b", role: TensorRole::B, transposed: false },
        ],
    };

    fn check(options: &BlockLoraOptions, place: &Place) -> Result<(), String> {
        match options.blocks {
            blocks if !place.rank.is_multiple_of(blocks) => {
                Err(format!("{blocks} blocks do not divide rank {}", place.rank))
            }
            _ => Ok(()),
        }
    }

    fn build(options: &BlockLoraOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], blocks) = (site.place.shape, options.blocks);
        let width = site.place.rank / blocks;
        let bound = (d_in as f64).sqrt().recip();
        Ok(Self {
            a: site.trained("a", [d_in, width], |site| Ok(site.uniform("a", d_in * width, bound)))?,
            b: site.trained("b", [blocks, d_out, width], |_| Ok(vec![0.0; blocks * d_out * width]))?,
            scale: site.place.scale,
        })
    }
}
