"""Trains the base of the demo: a small tokenizer, VAE, CLIP text encoder and text-to-video 3D-UNet.

    python examples/demo_base/make.py --out examples/demo_base/weights

The output folder has the layout of `text-to-video-ms-1.7b`, so that one loader reads both. Four steps, each saved when
it finishes: `tokenizer`, `vae`, `decoder` (the VAE's, trained against flicker), `denoiser` (text encoder and 3D-UNet
jointly, with the denoising loss). The last step can run in several processes:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/demo_base/make.py --only denoiser

and resumes when the same command is given again. Scenes come from seeds below 1,000,000; the demo corpus and its
held-out clips start there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.demo_base.common import NUM_FRAMES, TEXT_LENGTH
from examples.demo_base.denoiser import FIRST_FRAME_SHARE, TEXT_RATE, DenoiserTraining, make_denoiser
from examples.demo_base.vae import make_vae, steady_decoder
from tasks.ingest.drawing import COLOURS, DIRECTIONS, SHAPES, SPEEDS
from trip_model.encoders import decode_latents, load_text_encoder, load_vae
from trip_model.images import write_video
from trip_model.unet import load_unet


def make_tokenizer(out: Path) -> None:
    """Trains a byte-pair tokenizer in CLIP's format on the captions' words; other words become letters."""
    captions = [f"a {c} {s} moving {d} {p}" for c in COLOURS for s in SHAPES for d in DIRECTIONS for p in SPEEDS]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        initial_alphabet=sorted(letters),
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(captions + [" ".join(sorted(letters))] * 2, trainer)
    folder = out / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    vocab_file, merges_file = bpe.model.save(str(folder))
    print(f"tokenizer: {bpe.get_vocab_size()} tokens")
    tokenizer = CLIPTokenizer(
        vocab=json.loads(Path(vocab_file).read_text()),
        merges=[
            tuple(line.split(" ")) for line in Path(merges_file).read_text().splitlines() if not line.startswith("#")
        ],
        model_max_length=TEXT_LENGTH,
    )
    Path(vocab_file).unlink()
    Path(merges_file).unlink()
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def preview(out: Path, seed: int = 0) -> None:
    """Samples four clips from text for visual inspection."""
    vae, text = load_vae(out), load_text_encoder(out)
    unet = load_unet(out).eval()
    scheduler = DDIMScheduler.from_pretrained(out / "scheduler")
    scheduler.set_timesteps(50)
    captions = [
        "a red circle moving right quickly",
        "a blue square moving down slowly",
        "a yellow triangle moving left quickly",
        "a white circle moving up slowly",
    ]
    features = text.encode(text.tokenize(captions))
    empty = text.encode(text.tokenize([""])).expand_as(features)
    z = torch.randn(4, 4, NUM_FRAMES, 8, 8, generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        with_text, without = unet(torch.cat([z, z]), t, torch.cat([features, empty])).chunk(2)
        z = scheduler.step(without + 2.0 * (with_text - without), t, z).prev_sample
    rows = [decode_latents(vae, z[i].permute(1, 0, 2, 3)) for i in range(4)]
    sheet = np.concatenate([np.concatenate(list(row[::3]), axis=1) for row in rows])
    write_video(out.parent / "t2v_preview", sheet[None], 1.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--only", choices=["tokenizer", "vae", "decoder", "denoiser", "preview"])
    parser.add_argument("--vae-steps", type=int, default=3500)
    parser.add_argument("--decoder-steps", type=int, default=3000)
    parser.add_argument("--steadiness", type=float, default=2.0, help="weight of the flicker in the decoder's loss")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--go-on", action="store_true", help="train the denoiser in --out further")
    parser.add_argument("--batch", type=int, default=4, help="of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=["v_prediction", "epsilon"], default="v_prediction")
    parser.add_argument("--first-frame-share", type=float, default=FIRST_FRAME_SHARE, help="0: text-to-video only")
    parser.add_argument("--time-power", type=float, default=1.0, help="below 1: more time steps near the noisy end")
    parser.add_argument("--muon-rate", type=float, default=0.0, help="above 0: Muon for the 3D-UNet's matrices")
    parser.add_argument("--text-dropout", type=float, default=0.1, help="share of the samples without a caption")
    parser.add_argument("--text-rate", type=float, default=TEXT_RATE, help="peak learning rate of the text encoder")
    parser.add_argument("--frozen-text", action="store_true", help="train the 3D-UNet only")
    parser.add_argument("--parts-of", type=Path, help="take tokenizer and VAE from this base")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.parts_of is not None:
        for part in ("tokenizer", "vae"):
            shutil.copytree(args.parts_of / part, args.out / part, dirs_exist_ok=True)
    if args.only in (None, "tokenizer"):
        make_tokenizer(args.out)
    if args.only in (None, "vae"):
        make_vae(args.out, args.vae_steps, args.seed)
    if args.only in (None, "decoder"):
        steady_decoder(args.out, args.decoder_steps, args.seed, args.steadiness)
    if args.only in (None, "denoiser"):
        names = [field.name for field in fields(DenoiserTraining)]
        make_denoiser(args.out, DenoiserTraining(**{name: getattr(args, name) for name in names}))
    if args.only in (None, "preview"):
        preview(args.out)
