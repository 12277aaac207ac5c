//! Conversion of Burn's own LoRA adapters to ALLoRA.

use std::collections::BTreeMap;

use burn::module::{
    LoraAdapter, Module, ModuleMapper, ModuleVisitor, Param, ParamId, Reparameterization, Reparameterizer,
};
use burn::tensor::{DType, Tensor};
use lowrank_optim::key_of;
use lowrank_optim::rules::{LoraPair, check_eta};

use super::allora::{Allora, AlloraOptions};
use crate::ground::any::AnyStructure;
use crate::ground::config::AdapterConfig;
use crate::ground::control::Control;
use crate::ground::error::AdapterError;
use crate::ground::site::Place;
use crate::ground::stack::{Adapter, AdapterStack};

impl Allora {
    /// Converts the adapters attached by Burn's [`Module::apply_lora`] to ALLoRA; layers that compose their weight get
    /// its exact gradients too. The scale of Burn's adapter is folded into B, so that the output does not change; if B
    /// is zero, the scale is lost.
    ///
    /// ```no_run
    /// # use burn::module::{Lora, Module};
    /// # use lowrank_adapters::{AdapterError, Allora, AlloraOptions};
    /// # fn example<M: Module>(model: M) -> Result<M, AdapterError> {
    /// Allora::convert(model.apply_lora(Lora::new(8, 8.0)), AlloraOptions::default())
    /// # }
    /// ```
    pub fn convert<M: Module>(module: M, options: AlloraOptions) -> Result<M, AdapterError> {
        let refuse = |reason: String| AdapterError::Refused(reason);
        check_eta(options.eta).map_err(|error| refuse(error.to_string()))?;
        let pairs = LoraPair::of(&module).map_err(|error| refuse(error.to_string()))?;
        let mut taken = Take { pairs: &pairs, other: None, factors: BTreeMap::new() };
        module.visit(&mut taken);
        if let Some(name) = taken.other {
            return Err(refuse(format!(
                "the module has adapters of another kind too ({name}): merge or remove them first"
            )));
        }
        let factors = taken.factors;
        let norm_of = serde_json::json!(options.norm_of);
        let control =
            Control::new(AdapterConfig::new("allora").with_option("eta", options.eta).with_option("norm_of", norm_of));
        // With B at zero, Burn's adapters add nothing to the frozen weights.
        let module = module.map(&mut Empty(&pairs)).materialize();
        Ok(module.apply_reparameterization(Convert { pairs: &pairs, factors, options, control }))
    }
}

/// Extracts the factors of Burn's adapters.
struct Take<'a> {
    pairs: &'a [LoraPair],
    other: Option<String>,
    factors: BTreeMap<ParamId, Param<Tensor<2>>>,
}

impl ModuleVisitor for Take<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        if container == "Reparameterization" && name != LoraAdapter::NAME {
            self.other = Some(name.to_string());
        }
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(pair) = self.pairs.iter().find(|pair| pair.a == param.id || pair.b == param.id) else { return };
        let &[rows, columns] = param.lazy_shape().as_slice() else { return };
        let value = param.val();
        let (tracked, trained) = (value.device().is_autodiff(), value.is_require_grad());
        let plain = value.without_autodiff().cast(DType::F32).reshape([rows, columns]);
        let plain = if pair.b == param.id { plain.mul_scalar(pair.scale) } else { plain };
        let value = if tracked { Tensor::from_inner(plain) } else { plain };
        let value = if trained { value.require_grad() } else { value };
        self.factors.insert(param.id, Param::initialized(param.id, value));
    }
}

struct Empty<'a>(&'a [LoraPair]);

impl ModuleMapper for Empty<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.0.iter().any(|pair| pair.b == param.id) {
            true => Param::initialized(param.id, param.val().zeros_like()),
            false => param,
        }
    }
}

struct Convert<'a> {
    pairs: &'a [LoraPair],
    factors: BTreeMap<ParamId, Param<Tensor<2>>>,
    options: AlloraOptions,
    control: Control,
}

impl Reparameterizer for Convert<'_> {
    type Reparam = AdapterStack;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<AdapterStack>) {
        let Some(pair) = self.pairs.iter().find(|pair| pair.weight == param.id) else { return (param, None) };
        let (Some(a), Some(b)) = (self.factors.remove(&pair.a), self.factors.remove(&pair.b)) else {
            return (param, None);
        };
        let structure = Allora { a, b, options: self.options };
        let (rank, shape) = (structure.a.dims()[1], [structure.a.dims()[0], structure.b.dims()[1]]);
        let place = Place {
            path: pair.path.clone(),
            shape,
            rank,
            alpha: 0.0,
            scale: 1.0,
            dropout: 0.0,
            init: "default".into(),
            layers: self.pairs.len(),
            largest: shape,
            bias: false,
            embedding: false,
        };
        let attached = Adapter {
            structure: AnyStructure::new(structure),
            origin: None,
            control: self.control.clone(),
            layer: key_of(&pair.path),
            place: place.into(),
        };
        (param, Some(AdapterStack { stack: vec![attached] }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{near, wave};
    use burn::module::Lora;
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::{GradientsParams, SgdConfig};
    use burn::tensor::Device;
    use lowrank_kernels::host::values as host;
    use lowrank_optim::rules::NormOf;

    #[derive(Module, Debug)]
    struct Burns {
        first: Linear,
        second: Linear,
    }

    #[test]
    fn burns_adapters_become_allora_with_its_gradients() {
        let device = Device::default().autodiff();
        let layer = |d_in, d_out| LinearConfig::new(d_in, d_out).init(&device);
        let plain = Burns { first: layer(6, 5), second: layer(5, 4) }.apply_lora(Lora::new(2, 4.0));
        let forward = |module: &Burns| module.second.forward(module.first.forward(wave([7, 6], 4)).tanh());
        let base = host(forward(&plain));
        let mut module = Allora::convert(plain.clone(), AlloraOptions { eta: 4.0, norm_of: NormOf::BaRow }).unwrap();
        assert_eq!(host(forward(&module)), base);
        assert_eq!(host(module.first.weight.base()), host(plain.first.weight.base()));
        let mut optimizer = SgdConfig::new().init();
        for _ in 0..3 {
            let grads = GradientsParams::from_grads(forward(&module).square().sum().backward(), &module);
            assert_eq!(grads.len(), 4, "those of the factors alone");
            module = optimizer.step(0.01, module, grads);
        }
        let moved = host(forward(&module));
        assert_ne!(moved, base);

        // gA = (G * scale) B', gB = A' (G * scale) with the gradient G of the whole weight and the learning-rate scale.
        let mut grads = forward(&module).square().sum().backward();
        let whole = module.clone().valid().materialize().train();
        let whole = Burns { first: whole.first.set_require_grad(true), second: whole.second.set_require_grad(true) };
        let mut expected = forward(&whole).square().sum().backward();
        let adapter = |linear: &Linear| {
            let adapter = linear.weight.reparameterization::<AdapterStack>().unwrap();
            adapter.stack[0].structure.downcast_ref::<Allora>().unwrap().clone()
        };
        for (ours, whole) in [(&module.first, &whole.first), (&module.second, &whole.second)] {
            let allora = adapter(ours);
            let gradient = whole.weight.val().grad_remove(&mut expected).unwrap() * allora.paces().inner().unsqueeze();
            let [a, b] = [allora.a.val(), allora.b.val()];
            let expected_a = gradient.clone().matmul(b.clone().inner().transpose());
            let expected_b = a.clone().inner().transpose().matmul(gradient);
            near(a.grad_remove(&mut grads).unwrap(), expected_a, 1e-5);
            near(b.grad_remove(&mut grads).unwrap(), expected_b, 1e-5);
        }
        assert!(Allora::convert(module, AlloraOptions::default()).is_err(), "there is no adapter of Burn any more");
    }

    #[test]
    fn a_scale_of_burns_adapter_becomes_part_of_b() {
        let device = Device::default().autodiff();
        let module = LinearConfig::new(6, 5).init(&device).apply_lora(Lora::new(2, 5.0));
        let x = || wave([7, 6], 4);
        let grads = GradientsParams::from_grads(module.forward(x()).square().sum().backward(), &module);
        let module = SgdConfig::new().init().step(0.01, module, grads);
        let expected = module.forward(x());
        near(Allora::convert(module, AlloraOptions::default()).unwrap().forward(x()), expected, 1e-6);
    }
}
