# %% [markdown]
# # Quick start
#
# Bags, a model, a folder of feature files, a training loop, a heat map: on a CPU, in seconds.
# `pip install "milkernels[data,viz]"`. This notebook is made of `examples/quick_start.py` by `make notebook`.
#
# ## Bags
#
# A bag is a tensor of instances, `[n, L]`. Bags of any lengths lie back to back in one value: there is no padding.

# %%
import torch

from milkernels import Bags, attention_weights
from milkernels.nn import ABMIL

torch.manual_seed(0)
bags = Bags.from_list([torch.randn(n, 64) for n in (500, 120, 2000)])
print(bags)

# %% [markdown]
# A model takes all of them in one call. It returns the logits of each bag, and what it attended to.

# %%
prediction = ABMIL(64, num_classes=2)(bags)
weights = attention_weights(prediction.pooled, bags.offsets)
print("logits", list(prediction.logits.shape), "weights", list(weights.shape))
print("the weights of each bag sum to", [round(w.sum().item(), 3) for w in weights.split(bags.lengths.tolist())])

# %% [markdown]
# ## Feature files
#
# Slides are usually stored as one file each: features of the patches, and their coordinates. Here are 60 simulated
# ones, small enough for a notebook. Half of them have a lesion: a disc of patches with other features.

# %%
import tempfile
from pathlib import Path

root, labels = Path(tempfile.mkdtemp()), {}
for i in range(60):
    side = 15 + i % 10
    coords = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    x = torch.randn(len(coords), 64).relu()
    if label := i % 2:
        centre = 2 + torch.randint(side - 4, (2,))
        x[(coords - centre).square().sum(1) <= 4, :8] += 1.5
    torch.save({"features": x.half(), "coords": 256 * coords}, root / f"slide_{i:02}.pt")
    labels[f"slide_{i:02}"] = label

# %% [markdown]
# `FeatureFolder` reads such a folder (`.h5`, `.pt`, `.npy`, `.npz`, zarr). `BagBatchSampler` makes batches of whole
# bags, up to a number of instances.

# %%
from torch.utils.data import DataLoader

from milkernels.data import BagBatchSampler, FeatureFolder

names = list(labels)
train = FeatureFolder(root, {name: labels[name] for name in names[:40]})
test = FeatureFolder(root, {name: labels[name] for name in names[40:]})
sampler = BagBatchSampler(train.lengths, max_instances=3000)
loader = DataLoader(train, batch_sampler=sampler, collate_fn=train.collate)
print(len(train), "slides of", min(train.lengths), "to", max(train.lengths), "patches in", len(loader), "batches")

# %% [markdown]
# ## Training

# %%
model = ABMIL(train.width, num_classes=2, embed_dim=64, hidden_dim=64)
optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
for epoch in range(15):
    total = 0.0
    for batch in loader:
        loss = torch.nn.functional.cross_entropy(model(batch["features"]).logits, batch["label"])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total += loss.item() * len(batch["label"]) / len(train)
    if epoch % 5 == 4:
        print(f"epoch {epoch + 1}: loss {total:.3f}")

# %% [markdown]
# The slides that it has not seen, all of them in one call:

# %%
held_out = test.collate([test[i] for i in range(len(test))])
model.eval()
with torch.no_grad():
    prediction = model(held_out["features"])
accuracy = (prediction.logits.argmax(1) == held_out["label"]).double().mean().item()
print(f"accuracy on {len(test)} slides: {accuracy:.2f} (chance: 0.50)")

# %% [markdown]
# ## Where it looked
#
# The colour is the percentile of a patch's attention in its slide.

# %%
# %matplotlib inline
from milkernels import attention_arrays, heatmap

slide = held_out["label"].tolist().index(1)
of_slide = attention_arrays(prediction.pooled, held_out["features"])[slide]
heatmap(of_slide.coords, of_slide.weights[:, 0], title=held_out["name"][slide], dpi=40)
