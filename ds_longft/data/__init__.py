"""From sets and texts to packs: conversion, synthesis, mixes, chat template, tokenising, packing, loading. No torch."""
