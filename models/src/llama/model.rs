//! The LLaMA model: embedding, decoder blocks, final norm and output head.
//!
//! "LLaMA: Open and Efficient Foundation Language Models" (arXiv 2302.13971), with grouped-query attention as in "GQA: Training
//! Generalized Multi-Query Transformer Models from Multi-Head Checkpoints" (arXiv 2305.13245). Fields carry the names of Hugging Face's
//! implementation, so that the path of a parameter is its name in a model file.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Device, Int, Tensor, TensorData};

use super::batch::LanguageBatch;
use super::block::{BlockContext, DecoderBlock};
use super::cache::KvCache;
use super::config::LlamaConfig;
use super::norm::RmsNorm;
use crate::error::ModelError;
use crate::linear::{Dense, NamedLayer, Parameterization};
use crate::ops::{self, Rotary};
use crate::segments::{Segment, SegmentedModel};
use crate::storage::MatrixStorage;
use crate::weights::{Builder, Choose, Init, Layout, RandomWeights, WeightSource, host};
use lowrank_adapters::{AdapterError, AdapterStack, Attach, Report};
use lowrank_optim::ModulePath;

/// Token embedding.
#[derive(Module, Debug)]
pub struct Embedding {
    /// One row per token id: `[vocab_size, hidden_size]`.
    pub weight: Param<Tensor<2>>,
}

/// Everything but the output head.
#[derive(Module, Debug)]
pub struct LlamaBody {
    /// Token embedding.
    pub embed_tokens: Embedding,
    /// Decoder blocks, first to last.
    pub layers: Vec<DecoderBlock>,
    /// Norm before the output head.
    pub norm: RmsNorm,
}

/// A LLaMA language model.
#[derive(Module, Debug)]
pub struct Llama {
    /// Embedding, blocks and final norm.
    pub model: LlamaBody,
    /// Output head `[hidden_size, vocab_size]`; none when the embedding serves as head.
    pub lm_head: Option<Dense>,
    #[module(skip)]
    config: LlamaConfig,
}

impl Llama {
    /// A model with random weights that depend on the seed alone.
    pub fn random(config: &LlamaConfig, seed: u64, device: &Device) -> Result<Self, ModelError> {
        let std = config.initializer_range;
        Self::build(config, &mut RandomWeights { seed, std }, device)
    }

    /// A model whose weights come from `source`. On an autodiff device every parameter is trainable, but for those that its parameterization freezes.
    pub fn build(config: &LlamaConfig, source: &mut dyn WeightSource, device: &Device) -> Result<Self, ModelError> {
        Self::build_stored(config, source, MatrixStorage::Wide, device)
    }

    /// As [`Llama::build`], with matrices in a storage; narrow ones are supported by the CPU backend alone.
    pub fn build_stored(
        config: &LlamaConfig,
        source: &mut dyn WeightSource,
        storage: MatrixStorage,
        device: &Device,
    ) -> Result<Self, ModelError> {
        config.validate()?;
        let mut builder = Builder { storage, ..Builder::new(source, device) };
        let table = [config.vocab_size, config.hidden_size];
        let embed_tokens =
            Embedding { weight: builder.matrix("model.embed_tokens.weight", table, Layout::AsStored, Init::Standard)? };
        let layers = (0..config.num_hidden_layers)
            .map(|layer| DecoderBlock::build(&mut builder, layer, config))
            .collect::<Result<_, _>>()?;
        let norm = RmsNorm::build(&mut builder, "model.norm", config.hidden_size, config)?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(Dense::build(&mut builder.of_tables(), "lm_head", config.hidden_size, config.vocab_size)?),
        };
        Ok(Self { model: LlamaBody { embed_tokens, layers, norm }, lm_head, config: config.clone() })
    }

    /// The same model with dense weights, which other programs can read. Rejected if no dense weight gives the same outputs.
    pub fn to_dense(&self, device: &Device) -> Result<Self, ModelError> {
        let mut vectors = Vectors::default();
        self.visit(&mut vectors);
        let mut weights = vectors.found;
        for (layer, block) in self.model.layers.iter().enumerate() {
            for (name, linear) in block.linears() {
                let dense = linear.to_dense().ok_or_else(|| {
                    let spec = self.config.parameterization.spec();
                    let reason = spec.exports.err().unwrap_or("it has none");
                    ModelError::Config(format!("{}: no dense weight gives the same outputs: {reason}", spec.name))
                })?;
                weights.insert(format!("model.layers.{layer}.{name}.weight"), dense);
            }
        }
        weights.insert("model.embed_tokens.weight".into(), self.model.embed_tokens.weight.val().inner());
        if let Some(head) = &self.lm_head {
            weights.insert("lm_head.weight".into(), head.weight.val().inner());
        }
        let config = LlamaConfig { parameterization: Parameterization::default(), ..self.config.clone() };
        Self::build(&config, &mut Given { weights }, device)
    }

    /// The same model with more tokens: their rows in the embedding and in the head are zero. The number of tokens never falls.
    pub fn with_vocabulary(mut self, tokens: usize) -> Self {
        let more = tokens.saturating_sub(self.config.vocab_size);
        let longer = |table: Tensor<2>, axis: usize| {
            let mut shape = table.dims();
            shape[axis] = more;
            let rows = Tensor::zeros(shape, (&table.device(), table.dtype()));
            Tensor::cat(vec![table, rows], axis).detach()
        };
        if more > 0 {
            self.model.embed_tokens.weight = self.model.embed_tokens.weight.map(|table| longer(table, 0));
            self.lm_head = self.lm_head.map(|mut head| {
                head.weight = head.weight.map(|table| longer(table, 1));
                head
            });
            self.config.vocab_size = tokens;
        }
        self
    }

    /// The same model whose head is a copy of the embedding's table, if it was the table itself.
    pub fn with_own_head(mut self) -> Self {
        if self.lm_head.is_none() {
            let table = ops::widened(self.model.embed_tokens.weight.val().detach());
            self.lm_head = Some(Dense::from_parts(table.transpose().detach(), None));
            self.config.tie_word_embeddings = false;
        }
        self
    }

    /// Attaches an adapter to the matching linear layers and freezes everything else.
    pub fn attach(self, attach: Attach) -> Result<(Self, Report), AdapterError> {
        if !self.config.parameterization.is_dense() {
            return Err(AdapterError::Refused(format!(
                "adapters attach to dense weights; the layers of this model are {}: export it as a dense model first",
                self.config.parameterization.name()
            )));
        }
        let tied = self.lm_head.is_none();
        let (model, mut report) = attach.factored().to(self)?;
        if tied && report.layers.iter().any(|layer| layer.place.embedding) {
            report.warnings.push(
                "the adapter of the embedding leaves the head alone, which shares its table; merging changes both"
                    .into(),
            );
        }
        Ok((model, report))
    }

    /// Mutable references to the linear layers of all blocks, with their paths.
    pub fn linears_mut(&mut self) -> Vec<NamedLayer<'_>> {
        let blocks = self.model.layers.iter_mut().enumerate();
        let layers = blocks.flat_map(|(number, block)| {
            block.linears_mut().map(|(name, linear)| (format!("model.layers.{number}.{name}"), linear.layer_mut()))
        });
        layers.collect()
    }

    /// The configuration the model was built from.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Final hidden states after the last norm.
    ///
    /// - `ids`: token ids `[batch, positions]`
    /// - `starts`: for each position the first position of its document `[batch, positions]`; none when every row is one document
    /// - returns `[batch, positions, hidden_size]`
    pub fn hidden(&self, ids: Tensor<2, Int>, starts: Option<Tensor<2, Int>>) -> Tensor<3> {
        let context = self.block_context(&ids, starts);
        let embedded = self.embedded(ids);
        let hidden = self.model.layers.iter().fold(embedded, |x, block| block.forward(x, &context));
        self.model.norm.forward(hidden)
    }

    fn block_context(&self, ids: &Tensor<2, Int>, starts: Option<Tensor<2, Int>>) -> BlockContext {
        let (shape, device) = (ids.dims(), ids.device());
        let rotary = self.rotary(shape[1], &device);
        BlockContext::new(rotary, starts, self.config.features.sliding_window, shape, &device)
    }

    /// Hidden states before the first block `[batch, positions, hidden_size]`.
    fn embedded(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let embedded = AdapterStack::rows(&self.model.embed_tokens.weight, ids);
        match self.config.features.embedding_multiplier {
            None => embedded,
            Some(multiplier) => embedded.mul_scalar(multiplier),
        }
    }

    /// Input of the output head `[rows, hidden_size]`, whose products with it are the logits.
    fn before_head(&self, hidden: Tensor<2>) -> Tensor<2> {
        match self.config.features.logits_scaling {
            None => hidden,
            Some(divisor) => hidden.div_scalar(divisor),
        }
    }

    /// Logits `[batch, positions, vocab_size]` of token ids `[batch, positions]`; `starts` as in [`Llama::hidden`].
    pub fn logits(&self, ids: Tensor<2, Int>, starts: Option<Tensor<2, Int>>) -> Tensor<3> {
        let [batch, positions] = ids.dims();
        let hidden = self.hidden(ids, starts).reshape([batch * positions, self.config.hidden_size]);
        ops::linear(self.before_head(hidden), self.head_weight()).reshape([batch, positions, self.config.vocab_size])
    }

    /// Sum of the cross-entropies in nats over the targets that are not [`ops::IGNORE`], shape `[1]`.
    ///
    /// Targets `[batch, positions]` are already shifted: the target at a position is the token that follows it.
    pub fn loss_sum(&self, ids: Tensor<2, Int>, targets: Tensor<2, Int>, starts: Option<Tensor<2, Int>>) -> Tensor<1> {
        self.loss_of_hidden(self.hidden(ids, starts), targets)
    }

    /// [`Llama::loss_sum`] of each row.
    pub fn row_losses(&self, ids: Tensor<2, Int>, targets: Tensor<2, Int>) -> Vec<Tensor<1>> {
        let hidden = self.hidden(ids, None);
        let row = |row| self.loss_of_hidden(hidden.clone().narrow(0, row, 1), targets.clone().narrow(0, row, 1));
        (0..hidden.dims()[0]).map(row).collect()
    }

    fn loss_of_hidden(&self, hidden: Tensor<3>, targets: Tensor<2, Int>) -> Tensor<1> {
        let [batch, positions, width] = hidden.dims();
        let hidden = hidden.reshape([batch * positions, width]);
        ops::linear_cross_entropy(self.before_head(hidden), self.head_weight(), targets.reshape([batch * positions]))
    }

    /// Logits `[batch, vocab_size]` of the last position of `ids [batch, positions]`, which follow the positions in the cache.
    pub fn next_logits(&self, ids: Tensor<2, Int>, cache: &mut KvCache) -> Tensor<2> {
        let [batch, positions] = ids.dims();
        let rotary = self.rotary(cache.len() + positions, &ids.device());
        let mut x = self.embedded(ids);
        for (layer, block) in self.model.layers.iter().enumerate() {
            x = block.forward_cached(x, &rotary, cache, layer);
        }
        cache.advance(positions);
        let last = x.slice([0..batch, positions - 1..positions]);
        let last = self.model.norm.forward(last).reshape([batch, self.config.hidden_size]);
        ops::linear(self.before_head(last), self.head_weight())
    }

    /// Checks that ids have an embedding, before they reach a kernel that cannot report which one is wrong.
    pub fn check_ids(&self, ids: &[i32]) -> Result<(), ModelError> {
        match ids.iter().position(|id| usize::try_from(*id).map_or(true, |id| id >= self.config.vocab_size)) {
            None => Ok(()),
            Some(position) => {
                Err(ModelError::TokenId { id: i64::from(ids[position]), position, vocab_size: self.config.vocab_size })
            }
        }
    }

    /// Output head `[hidden_size, vocab_size]`, a transposed view of the embedding when they are tied.
    fn head_weight(&self) -> Tensor<2> {
        match &self.lm_head {
            Some(head) => head.weight.val(),
            None => AdapterStack::table(&self.model.embed_tokens.weight).transpose(),
        }
    }

    fn rotary(&self, positions: usize, device: &Device) -> Rotary {
        let LlamaConfig { head_dim, rope_theta, rope_scaling, max_position_embeddings, .. } = &self.config;
        match rope_scaling {
            None => Rotary::new(*head_dim, positions, *rope_theta, device),
            Some(scaling) => {
                let base = scaling.base(*rope_theta, *head_dim, *max_position_embeddings, positions);
                let rates = scaling.rates(*head_dim, base, Rotary::rates(*head_dim, base));
                Rotary::of_rates(&rates, scaling.attention_factor(), positions, device)
            }
        }
    }
}

impl SegmentedModel for Llama {
    type Batch = LanguageBatch;
    type Hidden = Tensor<3>;
    type Context = BlockContext;

    fn context(&self, batch: &LanguageBatch) -> BlockContext {
        self.block_context(&batch.inputs, batch.starts.clone())
    }

    fn enter(&self, batch: &LanguageBatch, _: &BlockContext) -> Tensor<3> {
        self.embedded(batch.inputs.clone())
    }

    fn blocks(&self) -> usize {
        self.model.layers.len()
    }

    fn block(&self, number: usize, x: Tensor<3>, context: &BlockContext) -> Tensor<3> {
        self.model.layers[number].forward(x, context)
    }

    fn loss(&self, x: Tensor<3>, batch: &LanguageBatch) -> Tensor<1> {
        self.loss_of_hidden(self.model.norm.forward(x), batch.targets.clone())
    }

    fn counted(batch: &LanguageBatch) -> u64 {
        batch.counted()
    }

    fn tied(&self) -> Vec<ParamId> {
        if self.lm_head.is_none() { vec![self.model.embed_tokens.weight.id] } else { Vec::new() }
    }

    fn visit_segment<V: ModuleVisitor>(&self, segment: Segment, visitor: &mut V) {
        match segment {
            Segment::Entry => self.model.embed_tokens.visit(visitor),
            Segment::Block(number) => self.model.layers[number].visit(visitor),
            Segment::Head => {
                self.model.norm.visit(visitor);
                self.lm_head.visit(visitor);
            }
        }
    }
}

/// Norms and biases of a model by their paths, as matrices of one row.
#[derive(Default)]
struct Vectors {
    path: ModulePath,
    found: BTreeMap<String, Tensor<2>>,
}

impl ModuleVisitor for Vectors {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if D == 1 {
            let vector = param.val().inner();
            let width = vector.dims()[0];
            self.found.insert(self.path.joined(), vector.reshape([1, width]));
        }
    }
}

/// Weights of another model, in the model's own order.
struct Given {
    weights: BTreeMap<String, Tensor<2>>,
}

impl Given {
    fn take(&mut self, path: &str) -> Result<Vec<f32>, ModelError> {
        let weight = self.weights.remove(path);
        let weight = weight.ok_or_else(|| ModelError::Config(format!("{path} is missing in the other model")))?;
        Ok(host(weight))
    }
}

impl WeightSource for Given {
    fn matrix(&mut self, path: &str, _: [usize; 2], _: Layout, _: Init) -> Result<Vec<f32>, ModelError> {
        self.take(path)
    }

    fn vector(&mut self, path: &str, _: usize, _: Init) -> Result<Vec<f32>, ModelError> {
        self.take(path)
    }

    fn positions(&mut self, path: &str, _: usize, _: usize, _: Option<Choose>) -> Result<Vec<i32>, ModelError> {
        Err(ModelError::Config(format!("{path}: a dense model has no positions")))
    }
}

/// Token ids as a tensor `[batch, positions]` from row-major values.
pub fn ids_tensor(ids: &[i32], batch: usize, device: &Device) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::new(ids.to_vec(), [batch, ids.len() / batch]), device)
}
