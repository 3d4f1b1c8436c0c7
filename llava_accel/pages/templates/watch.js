// Looks whether there is more to show. A page is loaded anew, at the same place, unless the reader is in the midst of it.
(() => {
  const state = document.getElementById("live");
  const isBusy = () => document.querySelector(".zoom input:checked, #clear:not([hidden]), details[open]") !== null;
  setInterval(async () => {
    if (document.hidden) return;
    try {
      const answer = await fetch(location.pathname, { method: "HEAD", cache: "no-store" });
      if (answer.headers.get("ETag") === `"${state.dataset.version}"`) return;
      if (!isBusy()) location.reload();
      state.textContent = "There is more to show: as soon as no filter is set, nothing enlarged and nothing unfolded.";
    } catch {
      state.textContent = "llava-accel watch has ended: this page stays as it is.";
    }
  }, 2000);
})();
