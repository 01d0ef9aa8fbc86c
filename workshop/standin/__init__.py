"""The stand-in for i-CLEVR: scenes, rendering with Mitsuba, packing."""
